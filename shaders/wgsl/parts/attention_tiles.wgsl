{#
Macros of the attention kernels: tiles in workgroup memory and the two products made of them.
A file takes them with `import … with context`; they read its constants:
    head_size;
    teams: how many teams of lanes a workgroup has; each walks past every teams-th tile of side b;
    team_lanes: lanes of a team, a multiple of 64;
    slices: how many slices of lanes a team has, of which each takes its share of the columns of
        every chunk: its part of products over the head, and its own columns of sums;
    per_lane: rows of side a that a lane holds;
    chunk: vec4 columns of the head in a tile of side b, 8, 16, 32 or 64, 8 · slices at least; with
        slices a divisor of the head;
    held: whether the tiles of side a stay in workgroup memory, whole, or are loaded in chunks too;
    prefetch: whether the next tile of side b is read into registers before this one is worked on;
    unroll: columns in one turn of the loop of products;
    tile_type: f16 or f32, what tiles hold;
    half: whether products of f16 tiles are f16 too, and the sums of at most 32 of them, which f32
        sums then take over. Then tiles of side a may hold `half_scale` times their rows, and
        weights are f16: see `store_weights`;
    scale, half_scale (the power of two next to it) and softcap;
and use its variables `lane`, `team`, `slice`, `ty` and `tx` (see `declare_lanes`).

The block of rows that a workgroup owns (queries, or keys) is side a: `high` · per_lane rows, of
which a lane holds ty, ty + high, …. Side b is what it walks past, 32 rows for each team at a time:
a lane holds rows 4 · tx … 4 · tx + 3 as the components of one vec4. Sums are named {sum}{i}, or
{sum}{n}_{i} where they are output columns: row ty + high · i, vec4 column `column(n)` + slice_tx.
#}
{% from "parts/stored.wgsl" import stored %}
{% set head = head_size // 4 %}
{% set chunks = (head + chunk - 1) // chunk %}
{% set span = chunk // slices %}
{% set head_groups = (head + 7) // 8 %}
{% set groups = (head_groups + slices - 1) // slices %}
{% set ragged = head % chunk != 0 %}
{% set high = team_lanes // (8 * slices) %}
{% set block = high * per_lane %}
{% set width = chunks * chunk if held else chunk %}
{% set loads = 32 * chunk // team_lanes %}

{# The first column of chunk k. #}
{% macro at(k) %}{{ k * chunk }}u{% endmacro %}

{# Where the slices' n-th columns of sums begin; at 8 · n where there is one slice. #}
{% macro column(n) %}{{ n // (span // 8) * chunk + n % (span // 8) * 8 }}u{% endmacro %}

{# The condition that the lane's n-th column lies in the head; empty where all do. #}
{% macro inside(n) %}{% if head % 8 %}if (tx < {{ head - 8 * n }}u) {% endif %}{% endmacro %}

{# The condition that the lane's slice finishes row i's products, which all slices have a part of. #}
{% macro owns(i) %}{% if slices > 1 %}if (slice == {{ i % slices }}u) {% endif %}{% endmacro %}

{% macro declare_tiles(tiles_of_a) %}
const lanes = {{ teams * team_lanes }}u;
const block = {{ block }}u; // rows of side a
const pace = {{ 32 * teams }}u; // rows of side b that all teams walk past at once
var<workgroup> tile_a: array<vec4<{{ tile_type }}>, {{ (tiles_of_a if held else 1) * block * width }}>;
var<workgroup> tile_b: array<vec4<{{ tile_type }}>, {{ teams * 32 * chunk }}>; // [team][row][column], see below
{% if slices > 1 %}
// [slice][team][row of a][4 rows of b]: the slices' parts of products; then the first's are weights.
{% else %}
// [team][row of a][4 rows of b]
{% endif %}
var<workgroup> weights: array<vec4<f32>, {{ slices * teams * block * 8 }}>;
{% if half %}
var<workgroup> half_weights: array<vec4<f16>, {{ teams * block * 8 }}>; // [team][row of a][4 rows of b]
{% endif %}
{% endmacro %}

{% macro declare_lanes() %}
    let team = lane / {{ team_lanes }}u;
    let mate = lane % {{ team_lanes }}u; // the lane within its team
    {% if slices > 1 %}
    let slice = mate / {{ team_lanes // slices }}u;
    let ty = mate % {{ team_lanes // slices }}u / 8u;
    {% else %}
    let ty = mate / 8u;
    {% endif %}
    let tx = mate % 8u;
    let slice_tx = {{ "slice * " ~ span ~ "u + " if slices > 1 }}tx;
    let a_row = ty * {{ width }}u; // where the lane's first row is in a tile of side a
    let b_tile = team * {{ 32 * chunk }}u; // where the team's tile of side b is
    let w_row = (team * block + ty) * 8u; // where the weights of the lane's first row are
    let part_row = w_row{{ " + slice * " ~ teams * block * 8 ~ "u" if slices > 1 }}; // and its slice's parts
    {% if prefetch %}
    {% for n in range(loads) %}
    var next{{ n }} = vec4<{{ tile_type }}>();
    {% endfor %}
    {% endif %}
{% endmacro %}

{#
Loads take the rows `first` … of `buffer`, `stride` vec4 long, from vec4 column `offset` + `column`.
A row at or past `end` repeats row end - 1: the kernels give it no weight and do not write it, but
what lies there may be stale, NaN even, and 0 · NaN is not 0. In the same way columns past the head
repeat its last one; tile_a has zeros there, so that they add nothing to products. With `scaled` and
half, tile_a holds the rows times half_scale, lest products overflow.
#}
{% macro load_a(buffer, stride, offset, column="0u", tile=0, scaled=false) %}
    {% set factor = " * f16(" ~ half_scale ~ ")" if half and scaled else "" %}
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
        let value = vec4<{{ tile_type }}>({{ buffer }}[at + min(c, {{ head - 1 }}u)]){{ factor }};
        tile_a[lane + {{ n * workers + (tile if held else 0) * pieces }}u] =
            select(vec4<{{ tile_type }}>(), value, c < {{ head }}u);
    {% else %}
        tile_a[lane + {{ n * workers + (tile if held else 0) * pieces }}u] =
            vec4<{{ tile_type }}>({{ buffer }}[at + c]){{ factor }};
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
        {{ to }}{{ n }} = vec4<{{ tile_type }}>({{ piece[0] }}[
            min(r + {{ n * team_lanes // chunk }}u, {{ piece[2] }} - 1u) * {{ piece[3] }}u + c
        ]);
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
        var next{{ n }}: vec4<{{ tile_type }}>;
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
4 rows of b, columns in ascending order, of each slice its own: see `join_slices`. `b` and `next` are
pieces, of which b takes its columns here. `scaled`: see `load_a`.
#}
{% macro add_products(sum, tile, a, b, next, scaled=false) %}
    {% set whole = chunks * span <= 32 %}
    {% if half and whole %}
    {
    {{ begin_half() }}
    {% endif %}
    {% if chunks == 1 %}
    {{ take_b(b + ["0u"], [next], "" if held else load_a(a[0], a[1], a[2], scaled=scaled)) }}
    {{ add_chunk_products(sum, tile, "0u", not whole) }}
    {% else %}
    for (var column = 0u; column < {{ chunks * chunk }}u; column += {{ chunk }}u) {
    {{ take_b(
        b + ["column"],
        [b + ["(column + " ~ chunk ~ "u)"], next],
        "" if held else load_a(a[0], a[1], a[2], "column", scaled=scaled)
    ) }}
    {{ add_chunk_products(sum, tile, "column", not whole) }}
    }
    {% endif %}
    {% if half and whole %}
    {{ end_half(sum) }}
    }
    {% endif %}
{% endmacro %}

{# Sums in f16: h{i}_{j} of row i of a and the lane's row j of b, each over every fourth column. #}
{% macro begin_half() %}
    {% for i in range(per_lane) %}
    {% for j in range(4) %}
        var h{{ i }}_{{ j }} = vec4<f16>();
    {% endfor %}
    {% endfor %}
{% endmacro %}

{% macro end_half(sum) %}
    {% for i in range(per_lane) %}
        {
    {% for j in range(4) %}
            let h{{ j }} = vec4<f32>(h{{ i }}_{{ j }});
    {% endfor %}
            {{ sum }}{{ i }} += vec4<f32>(
    {% for j in range(4) %}
                (h{{ j }}.x + h{{ j }}.y) + (h{{ j }}.z + h{{ j }}.w){{ "," if j < 3 }}
    {% endfor %}
            );
        }
    {% endfor %}
{% endmacro %}

{% macro add_chunk_products(sum, tile, column, carry) %}
    {
        let b = b_tile + 4u * tx * {{ chunk }}u{{ " + slice * " ~ span ~ "u" if slices > 1 }};
        let a = a_row + {{ tile * block * width ~ "u + " ~ column if held else "0u" }}{{ " + slice * " ~ span ~ "u" if slices > 1 }};
    {% if half and carry %}
    {{ begin_half() }}
    {% endif %}
    {% if unroll < span %}
        for (var c = 0u; c < {{ span }}u; c += {{ unroll }}u) {
    {% else %}
        let c = 0u;
    {% endif %}
    {% for n in range([unroll, span] | min) %}
        {
            let at = b + ((c + {{ n }}u) ^ tx);
    {% for j in range(4) %}
            let b{{ j }} = {{ "" if half else "vec4<f32>" }}(tile_b[at + {{ j * chunk }}u]);
    {% endfor %}
    {% if not half %}
    {% for x in "xyzw" %}
            let b_{{ x }} = vec4<f32>(b0.{{ x }}, b1.{{ x }}, b2.{{ x }}, b3.{{ x }});
    {% endfor %}
    {% endif %}
    {% for i in range(per_lane) %}
            let a{{ i }} = {{ "" if half else "vec4<f32>" }}(tile_a[a + c + {{ i * high * width + n }}u]);
    {% if half %}
    {% for j in range(4) %}
            h{{ i }}_{{ j }} = fma(a{{ i }}, b{{ j }}, h{{ i }}_{{ j }});
    {% endfor %}
    {% else %}
    {% for x in "xyzw" %}
            {{ sum }}{{ i }} = fma(vec4<f32>(a{{ i }}.{{ x }}), b_{{ x }}, {{ sum }}{{ i }});
    {% endfor %}
    {% endif %}
    {% endfor %}
        }
    {% endfor %}
    {% if unroll < span %}
        }
    {% endif %}
    {% if half and carry %}
    {{ end_half(sum) }}
    {% endif %}
    }
{% endmacro %}

{#
{sum}{i} of the slices meet, in order, in the slice that owns row i: see `owns`. `free`: whether a
barrier has passed since weights were last read.
#}
{% macro join_slices(sum, free=true) %}
    {% if slices > 1 %}
    {% if not free %}
    workgroupBarrier();
    {% endif %}
    {% for i in range(per_lane) %}
    weights[part_row + {{ 8 * high * i }}u + tx] = {{ sum }}{{ i }};
    {% endfor %}
    workgroupBarrier();
    {% for i in range(per_lane) %}
    {{ owns(i) }}{
        let at = w_row + {{ 8 * high * i }}u + tx;
        {{ sum }}{{ i }} = weights[at];
    {% for other in range(1, slices) %}
        {{ sum }}{{ i }} += weights[at + {{ 8 * other * teams * block }}u];
    {% endfor %}
    }
    {% endfor %}
    {% endif %}
{% endmacro %}

{# The statement that makes `value`, a vec4<f32>, the lane's weights of row i. #}
{% macro store_weights(i, value) -%}
{{ "half_weights" if half else "weights" }}[w_row + {{ 8 * high * i }}u + tx] = {{ stored(value, "f16" if half else "f32") }};
{%- endmacro %}

{#
{sum}{n}_{i} += weights[i] · tile_b, which has chunk k, rows of b in ascending order; `total`{i}, if
given, += the weights alone. A weight of 0 changes nothing, not a bit.
#}
{% macro add_weighted(sum, k, total="") %}
    {% set turns = [[unroll // 4, 1] | max, 8] | min %}
    {% set columns = range(k * span // 8, [(k + 1) * span // 8, groups] | min) %}
    {
    {% if half %}
    {% for n in columns %}
    {% for i in range(per_lane) %}
        var h{{ n }}_{{ i }} = vec4<f16>();
    {% endfor %}
    {% endfor %}
    {% endif %}
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
            let w{{ i }} = {{ "half_weights" if half else "weights" }}[w_row + {{ 8 * high * i }}u + h];
    {% if total %}
    {% for x in "xyzw" %}
            {{ total }}{{ i }} += f32(w{{ i }}.{{ x }});
    {% endfor %}
    {% endif %}
    {% endfor %}
            let at = b_tile + 4u * h * {{ chunk }}u + (slice_tx ^ h);
    {% for n in columns %}
    {% for j in range(4) %}
            let b{{ n }}_{{ j }} = {{ "" if half else "vec4<f32>" }}(tile_b[at + {{ j * chunk + 8 * n - k * span }}u]);
    {% endfor %}
    {% for i in range(per_lane) %}
    {% for j in range(4) %}
    {% if half %}
            h{{ n }}_{{ i }} = fma(vec4<f16>(w{{ i }}.{{ "xyzw"[j] }}), b{{ n }}_{{ j }}, h{{ n }}_{{ i }});
    {% else %}
            {{ sum }}{{ n }}_{{ i }} =
                fma(vec4<f32>(w{{ i }}.{{ "xyzw"[j] }}), b{{ n }}_{{ j }}, {{ sum }}{{ n }}_{{ i }});
    {% endif %}
    {% endfor %}
    {% endfor %}
    {% endfor %}
        }
    {% endfor %}
    }
    {% if half %}
    {% for n in columns %}
    {% for i in range(per_lane) %}
        {{ sum }}{{ n }}_{{ i }} += vec4<f32>(h{{ n }}_{{ i }});
    {% endfor %}
    {% endfor %}
    {% endif %}
    }
{% endmacro %}

{# The teams' sums meet in the first team's: {sum}{n}_{i} += those of teams 1, 2, …, in order. #}
{% macro add_teams(sum) %}
    {% if teams > 1 %}
    {% for n in range(groups) %}
    workgroupBarrier();
    {% for i in range(per_lane) %}
    weights[part_row + {{ 8 * high * i }}u + tx] = {{ sum }}{{ n }}_{{ i }};
    {% endfor %}
    workgroupBarrier();
    if (team == 0u) {
    {% for i in range(per_lane) %}
    {% for t in range(1, teams) %}
        {{ sum }}{{ n }}_{{ i }} += weights[part_row + {{ 8 * (t * block + high * i) }}u + tx];
    {% endfor %}
    {% endfor %}
    }
    {% endfor %}
    {% endif %}
{% endmacro %}

{#
Scores from products: {s}{i} becomes the scaled (and capped) score; with a cap, t{i} its tanh. Of
products with rows that were scaled (see `load_a`), what is missing.
#}
{% macro scale_scores(s) %}
    {% set rest = scale / half_scale if half else scale %}
    {% for i in range(per_lane) %}
    {% if softcap %}
        // Some drivers' tanh overflows; beyond ±10 it is ±1 in f32.
        let t{{ i }} = tanh(clamp(
            {{ s }}{{ i }} * {{ rest / softcap }}, vec4<f32>(-10.0), vec4<f32>(10.0)
        ));
        {{ s }}{{ i }} = t{{ i }} * {{ softcap }};
    {% else %}
        {{ s }}{{ i }} *= {{ rest }};
    {% endif %}
    {% endfor %}
{% endmacro %}
