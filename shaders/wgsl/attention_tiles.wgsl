{#
Macros of the attention kernels: tiles in workgroup memory and the two products made of them.
A file takes them with `import … with context`; they read its constants:
    head_size;
    teams: how many teams of lanes a workgroup has; each walks past every teams-th tile of side b;
    team_lanes: lanes of a team, a multiple of 64;
    per_lane: rows of side a that a lane holds;
    chunk: vec4 columns of the head in a tile of side b, 8, 16 or 32;
    held: whether the tiles of side a stay in workgroup memory, whole, or are loaded in chunks too;
    prefetch: whether the next tile of side b is read into registers before this one is worked on;
    unroll: columns in one turn of the loop of products;
    scale and softcap;
and use its variables `lane`, `team`, `ty` and `tx` (see `declare_lanes`).

The block of rows that a workgroup owns (queries, or keys) is side a: `high` · per_lane rows, of
which a lane holds ty, ty + high, …. Side b is what it walks past, 32 rows for each team at a time:
a lane holds rows 4 · tx … 4 · tx + 3 as the components of one vec4. Sums are named {sum}{i}, or
{sum}{n}_{i} where they are output columns: row ty + high · i, vec4 column 8 · n + tx.
#}
{% set head = head_size // 4 %}
{% set chunks = (head + chunk - 1) // chunk %}
{% set groups = (head + 7) // 8 %}
{% set ragged = head % chunk != 0 %}
{% set high = team_lanes // 8 %}
{% set block = high * per_lane %}
{% set width = chunks * chunk if held else chunk %}
{% set loads = 32 * chunk // team_lanes %}

{# The first column of chunk k. #}
{% macro at(k) %}{{ k * chunk }}u{% endmacro %}

{% macro declare_tiles(tiles_of_a) %}
const lanes = {{ teams * team_lanes }}u;
const block = {{ block }}u; // rows of side a
const pace = {{ 32 * teams }}u; // rows of side b that all teams walk past at once
var<workgroup> tile_a: array<vec4<f32>, {{ (tiles_of_a if held else 1) * block * width }}>;
var<workgroup> tile_b: array<vec4<f32>, {{ teams * 32 * chunk }}>; // [team][row][column], see below
var<workgroup> weights: array<vec4<f32>, {{ teams * block * 8 }}>; // [team][row of a][4 rows of b]
{% endmacro %}

{% macro declare_lanes() %}
    let team = lane / {{ team_lanes }}u;
    let mate = lane % {{ team_lanes }}u; // the lane within its team
    let ty = mate / 8u;
    let tx = mate % 8u;
    let a_row = ty * {{ width }}u; // where the lane's first row is in a tile of side a
    let b_tile = team * {{ 32 * chunk }}u; // where the team's tile of side b is
    let w_row = (team * block + ty) * 8u; // where the weights of the lane's first row are
    {% if prefetch %}
    {% for n in range(loads) %}
    var next{{ n }} = vec4<f32>();
    {% endfor %}
    {% endif %}
{% endmacro %}

{#
Loads take the rows `first` … of `buffer`, `stride` vec4 long, from vec4 column `offset` + `column`.
A row at or past `end` repeats row end - 1: the kernels give it no weight and do not write it, but
what lies there may be stale, NaN even, and 0 · NaN is not 0. In the same way columns past the head
repeat its last one; tile_a has zeros there, so that they add nothing to products.
#}
{% macro load_a(buffer, stride, offset, column="0u", tile=0) %}
    {% set pieces = block * width %}
    {% set workers = teams * team_lanes %}
    {% for n in range((pieces + workers - 1) // workers) %}
    {% if pieces < (n + 1) * workers %}
    if (lane < {{ pieces - n * workers }}u)
    {% endif %}
    {
        let r = (lane + {{ n * workers }}u) / {{ width }}u;
        let c = {{ column }} + (lane + {{ n * workers }}u) % {{ width }}u;
        let at = min(first + r, last - 1u) * {{ stride }}u + {{ offset }};
    {% if ragged %}
        let value = {{ buffer }}[at + min(c, {{ head - 1 }}u)];
        tile_a[lane + {{ n * workers + (tile if held else 0) * pieces }}u] =
            select(vec4<f32>(), value, c < {{ head }}u);
    {% else %}
        tile_a[lane + {{ n * workers + (tile if held else 0) * pieces }}u] = {{ buffer }}[at + c];
    {% endif %}
    }
    {% endfor %}
{% endmacro %}

{# A team's 32 rows, the lane's share into {to}{n}; `piece` = [buffer, first, end, stride, offset,
column]. #}
{% macro fetch(to, piece) %}
    {
    {% if ragged %}
        let c = min({{ piece[5] }} + mate % {{ chunk }}u, {{ head - 1 }}u) + {{ piece[4] }};
    {% else %}
        let c = {{ piece[5] }} + mate % {{ chunk }}u + {{ piece[4] }};
    {% endif %}
        let r = {{ piece[1] }} + mate / {{ chunk }}u;
    {% for n in range(loads) %}
        {{ to }}{{ n }} = {{ piece[0] }}[
            min(r + {{ n * team_lanes // chunk }}u, {{ piece[2] }} - 1u) * {{ piece[3] }}u + c
        ];
    {% endfor %}
    }
{% endmacro %}

{#
Each team's tile_b becomes the 32 rows `this`; between the two barriers `beside` is done too. Column
c of row r is at r · chunk + (c xor r / 4 mod 8): lanes that read rows 4 · tx + j at one column, or
columns 8 · n + tx of one row, meet no bank conflict. With prefetch `this` was fetched before, and
the first of `next` is fetched now, or the last where `column` ends the head. `free`: whether a barrier has passed since tile_b was last read.
#}
{% macro take_b(this, next, beside="", free=false) %}
    {% if not free %}
    workgroupBarrier();
    {% endif %}
    {{ beside }}
    {
    {% if not prefetch %}
    {% for n in range(loads) %}
        var next{{ n }}: vec4<f32>;
    {% endfor %}
    {{ fetch("next", this) }}
    {% endif %}
    {% for n in range(loads) %}
        {
            let r = mate / {{ chunk }}u + {{ n * team_lanes // chunk }}u;
            let c = (mate % {{ chunk }}u) ^ (r / 4u % 8u);
            tile_b[b_tile + r * {{ chunk }}u + c] = next{{ n }};
        }
    {% endfor %}
    }
    {% if prefetch %}
    {% if next | length > 1 %}
    if (column < {{ (chunks - 1) * chunk }}u)
    {{ fetch("next", next[0]) }}
    else
    {% endif %}
    {{ fetch("next", next[-1]) }}
    {% endif %}
    workgroupBarrier();
{% endmacro %}

{#
{sum}{i} += row i of a, which is its tile `tile`, out of `a` = [buffer, stride, offset] · the lane's
4 rows of b, columns in ascending order. `b` and `next` are pieces, of which b takes its columns here.
#}
{% macro add_products(sum, tile, a, b, next) %}
    {% if chunks == 1 %}
    {{ take_b(b + ["0u"], [next], "" if held else load_a(a[0], a[1], a[2])) }}
    {{ add_chunk_products(sum, tile, "0u") }}
    {% else %}
    for (var column = 0u; column < {{ chunks * chunk }}u; column += {{ chunk }}u) {
    {{ take_b(
        b + ["column"],
        [b + ["(column + " ~ chunk ~ "u)"], next],
        "" if held else load_a(a[0], a[1], a[2], "column")
    ) }}
    {{ add_chunk_products(sum, tile, "column") }}
    }
    {% endif %}
{% endmacro %}

{% macro add_chunk_products(sum, tile, column) %}
    {
        let b = b_tile + 4u * tx * {{ chunk }}u;
        let a = a_row + {{ tile * block * width ~ "u + " ~ column if held else "0u" }};
    {% if unroll < chunk %}
        for (var c = 0u; c < {{ chunk }}u; c += {{ unroll }}u) {
    {% else %}
        let c = 0u;
    {% endif %}
    {% for n in range([unroll, chunk] | min) %}
        {
            let at = b + ((c + {{ n }}u) ^ tx);
    {% for j in range(4) %}
            let b{{ j }} = tile_b[at + {{ j * chunk }}u];
    {% endfor %}
    {% for x in "xyzw" %}
            let b_{{ x }} = vec4<f32>(b0.{{ x }}, b1.{{ x }}, b2.{{ x }}, b3.{{ x }});
    {% endfor %}
    {% for i in range(per_lane) %}
            let a{{ i }} = tile_a[a + c + {{ i * high * width + n }}u];
    {% for x in "xyzw" %}
            {{ sum }}{{ i }} = fma(vec4<f32>(a{{ i }}.{{ x }}), b_{{ x }}, {{ sum }}{{ i }});
    {% endfor %}
    {% endfor %}
        }
    {% endfor %}
    {% if unroll < chunk %}
        }
    {% endif %}
    }
{% endmacro %}

{#
{sum}{n}_{i} += weights[i] · tile_b, which has chunk k, rows of b in ascending order; `total`{i}, if
given, += the weights alone. A weight of 0 changes nothing, not a bit.
#}
{% macro add_weighted(sum, k, total="") %}
    {% set turns = [unroll // 4, 8] | min %}
    {% if turns < 8 %}
    for (var g = 0u; g < 8u; g += {{ turns }}u) {
    {% else %}
    {
        let g = 0u;
    {% endif %}
    {% for turn in range(turns) %}
        {
            let h = g + {{ turn }}u;
    {% for i in range(per_lane) %}
            let w{{ i }} = weights[w_row + {{ 8 * high * i }}u + h];
    {% if total %}
    {% for x in "xyzw" %}
            {{ total }}{{ i }} += w{{ i }}.{{ x }};
    {% endfor %}
    {% endif %}
    {% endfor %}
            let at = b_tile + 4u * h * {{ chunk }}u + (tx ^ h);
    {% for n in range(k * chunk // 8, [(k + 1) * chunk // 8, groups] | min) %}
    {% for j in range(4) %}
            let b{{ n }}_{{ j }} = tile_b[at + {{ j * chunk + 8 * n - k * chunk }}u];
    {% endfor %}
    {% for i in range(per_lane) %}
    {% for j in range(4) %}
            {{ sum }}{{ n }}_{{ i }} =
                fma(vec4<f32>(w{{ i }}.{{ "xyzw"[j] }}), b{{ n }}_{{ j }}, {{ sum }}{{ n }}_{{ i }});
    {% endfor %}
    {% endfor %}
    {% endfor %}
        }
    {% endfor %}
    }
{% endmacro %}

{# The teams' sums meet in the first team's: {sum}{n}_{i} += those of teams 1, 2, …, in order. #}
{% macro add_teams(sum) %}
    {% if teams > 1 %}
    {% for n in range(groups) %}
    workgroupBarrier();
    {% for i in range(per_lane) %}
    weights[w_row + {{ 8 * high * i }}u + tx] = {{ sum }}{{ n }}_{{ i }};
    {% endfor %}
    workgroupBarrier();
    if (team == 0u) {
    {% for i in range(per_lane) %}
    {% for t in range(1, teams) %}
        {{ sum }}{{ n }}_{{ i }} += weights[w_row + {{ 8 * (t * block + high * i) }}u + tx];
    {% endfor %}
    {% endfor %}
    }
    {% endfor %}
    {% endif %}
{% endmacro %}

{# Scores from products: {s}{i} becomes the scaled (and capped) score; with a cap, t{i} its tanh. #}
{% macro scale_scores(s) %}
    {% for i in range(per_lane) %}
    {% if softcap %}
        // Some drivers' tanh overflows; beyond ±10 it is ±1 in f32.
        let t{{ i }} = tanh(clamp(
            {{ s }}{{ i }} * {{ scale / softcap }}, vec4<f32>(-10.0), vec4<f32>(10.0)
        ));
        {{ s }}{{ i }} = t{{ i }} * {{ softcap }};
    {% else %}
        {{ s }}{{ i }} *= {{ scale }};
    {% endif %}
    {% endfor %}
{% endmacro %}
