{#
What the kernels of the gated delta rule on matrix units share: tiles of f16 in workgroup memory, and products of their
fragments. A file takes the macros with `import … with context`; they read its constants:
    chunk, head_size; subgroups: of a workgroup; m, n, k, subgroup_lanes: of fragments;
    emulated: whether the same runs in plain WGSL, for tests: a lane then holds every
        subgroup_lanes-th number of a fragment.

All workgroup memory but the gates is one array, `tiles`, of eight f16 or four f32 an element. Rows of a tile of f16 have
an element more than they need, off each other's banks.

Numbers become f16 once a power of two has brought the largest of their tile near 2^{{ 8 }}: what is above 2^-22 of it keeps
all bits, and sums of a chunk and of a head stay below 65504. Gradients and states have no size of their own.
#}
{% set lanes = subgroups * subgroup_lanes %}
{% set held = m * n // subgroup_lanes %}
{% from "parts/fragments.wgsl" import left_type, right_type, result_type, pack_eight, subgroups_entry with context %}

{% macro declare(size) %}
var<workgroup> tiles: array<vec4<u32>, {{ size }}>;
var<workgroup> largest: array<atomic<u32>, 2>; // of what is about to become a tile, as its bits

{{ pack_eight() }}

fn largest_of(most: f32, four: vec4<f32>) -> f32 {
    let size = abs(four);
    return max(most, max(max(size.x, size.y), max(size.z, size.w)));
}

// The power of two that brings the largest of a tile to 2^8 … 2^9; `unscaled` undoes it.
fn scale_of(bits: u32) -> f32 {
    return bitcast<f32>(clamp(262 - i32(bits >> 23u), 1, 253) << 23u);
}

fn unscaled(scale: f32) -> f32 {
    return bitcast<f32>((254u << 23u) - bitcast<u32>(scale));
}
{% endmacro %}

{# The entry point, up to the index of the workgroup. #}
{% macro entry() %}
{{ subgroups_entry() }}
{% if emulated %}
    let team = lane / {{ subgroup_lanes }}u;
    let team_lane = lane % {{ subgroup_lanes }}u;
{% endif %}
{% endmacro %}

{# The condition that a lane has a turn-th one of `count` units; empty where all lanes have. #}
{% macro has_unit(turn, count) %}{% if (turn + 1) * lanes > count %}if (lane < {{ count - turn * lanes }}u) {% endif %}{% endmacro %}
{% macro turns_of(count) %}{{ (count + lanes - 1) // lanes }}{% endmacro %}

{#
Reads `rows` rows of `across` eights into registers `{name}_{turn}_{half}`: numbers of `buffer` from the quad `at`, which may
read the `row`, times `factor`. Rows past the chunk's n are zero.
#}
{% macro fetch(name, rows, across, buffer, at, factor="", all_rows=false) %}
{% for u in range(turns_of(rows * across) | int) %}
    var {{ name }}_{{ u }}_0 = vec4<f32>();
    var {{ name }}_{{ u }}_1 = vec4<f32>();
    {{ has_unit(u, rows * across) }}
    {
        let i = (lane + {{ u * lanes }}u) / {{ across }}u;
{% if all_rows %}
        let row = i;
        let quad = {{ at }} + (lane + {{ u * lanes }}u) % {{ across }}u * 2u;
{% for h in range(2) %}
        {{ name }}_{{ u }}_{{ h }} = {{ buffer }}[quad + {{ h }}u]{{ " * " ~ factor if factor }};
{% endfor %}
{% else %}
        let row = min(i, n - 1u);
        let quad = {{ at }} + (lane + {{ u * lanes }}u) % {{ across }}u * 2u;
{% for h in range(2) %}
        {{ name }}_{{ u }}_{{ h }} = select(vec4<f32>(), {{ buffer }}[quad + {{ h }}u]{{ " * " ~ factor if factor }}, i < n);
{% endfor %}
{% endif %}
    }
{% endfor %}
{% endmacro %}

{# `most` grows to the largest of what was fetched. #}
{% macro largest_fetched(name, rows, across) %}
{% for u in range(turns_of(rows * across) | int) %}
    most = largest_of(largest_of(most, {{ name }}_{{ u }}_0), {{ name }}_{{ u }}_1);
{% endfor %}
{% endmacro %}

{# Writes what was fetched, times `factor`, as a tile. #}
{% macro put(name, rows, across, to, factor="") %}
{% set by = " * " ~ factor if factor else "" %}
{% for u in range(turns_of(rows * across) | int) %}
    {{ has_unit(u, rows * across) }}
    {
        let unit = lane + {{ u * lanes }}u;
        tiles[{{ to }}u + unit / {{ across }}u * {{ across + 1 }}u + unit % {{ across }}u] =
            packed({{ name }}_{{ u }}_0{{ by }}, {{ name }}_{{ u }}_1{{ by }});
    }
{% endfor %}
{% endmacro %}

{# Sums of `down` × `along` fragments of a subgroup, zero. #}
{% macro zero(sums, down, along) %}
{% if emulated %}
    var {{ sums }} = array<f32, {{ down * along * held }}>();
{% else %}
{% for i in range(down) %}
{% for j in range(along) %}
    var {{ sums }}_{{ i }}_{{ j }} = {{ result_type }}();
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{% macro _each_held(down, along) %}
    for (var at = 0u; at < {{ down * along * held }}u; at++) {
        let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
        let i = at / {{ along * held }}u * {{ m }}u + place / {{ n }}u;
        let j = at / {{ held }}u % {{ along }}u * {{ n }}u + place % {{ n }}u;
{{ caller() }}
    }
{% endmacro %}

{#
sums += a · b. `a` and `b` are [tile, eights of its rows, first row of a (column of b) of the subgroup, whether the tile lies the
other way: contracted along its rows, for a, or along its columns, for b].
#}
{% macro multiply(sums, down, along, a, b, depth) %}
{% set a_step = a[1] + 1 %}
{% set b_step = b[1] + 1 %}
{% if emulated %}
{% call _each_held(down, along) %}
        let x = {{ a[2] }} + i;
        let y = {{ b[2] }} + j;
        var total = {{ sums }}[at];
        for (var c = 0u; c < {{ depth }}u; c++) {
            let of_a = {% if a[3] %}number(tiles[{{ a[0] }} + c * {{ a_step }}u + x / 8u], x){% else %}number(tiles[{{ a[0] }} + x * {{ a_step }}u + c / 8u], c){% endif %};
            let of_b = {% if b[3] %}number(tiles[{{ b[0] }} + y * {{ b_step }}u + c / 8u], c){% else %}number(tiles[{{ b[0] }} + c * {{ b_step }}u + y / 8u], y){% endif %};
            total += of_a * of_b;
        }
        {{ sums }}[at] = total;
{% endcall %}
{% else %}
    {
        let of_a = {{ a[0] }} + {{ a[2] }}{{ " / 8u" if a[3] else " * %du" % a_step }};
        let of_b = {{ b[0] }} + {{ b[2] }}{{ " * %du" % b_step if b[3] else " / 8u" }};
{% for s in range(depth // k) %}
        {
{% for i in range(down) %}
            let left_{{ i }} = subgroupMatrixLoad<{{ left_type }}, {{ "col" if a[3] else "row" }}_major>(&tiles, of_a + {{ s * k * a_step + i * m // 8 if a[3] else i * m * a_step + s * k // 8 }}u, {{ a_step }}u);
{% endfor %}
{% for j in range(along) %}
            {
                let right = subgroupMatrixLoad<{{ right_type }}, {{ "col" if b[3] else "row" }}_major>(&tiles, of_b + {{ j * n * b_step + s * k // 8 if b[3] else s * k * b_step + j * n // 8 }}u, {{ b_step }}u);
{% for i in range(down) %}
                {{ sums }}_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate(left_{{ i }}, right, {{ sums }}_{{ i }}_{{ j }});
{% endfor %}
            }
{% endfor %}
        }
{% endfor %}
    }
{% endif %}
{% endmacro %}

{# Sums out of, or into, f32 in `tiles`: `at` is [place, quads of a row, first row, first column]. #}
{% macro load(sums, down, along, at) %}
{% if emulated %}
{% call _each_held(down, along) %}
        let x = {{ at[2] }} + i;
        let y = {{ at[3] }} + j;
        {{ sums }}[at] = bitcast<f32>(tiles[{{ at[0] }}u + x * {{ at[1] }}u + y / 4u][y % 4u]);
{% endcall %}
{% else %}
{% for i in range(down) %}
{% for j in range(along) %}
    {{ sums }}_{{ i }}_{{ j }} = subgroupMatrixLoad<{{ result_type }}, row_major>(&tiles, {{ at[0] + i * m * at[1] + j * n // 4 }}u + {{ at[2] }} * {{ at[1] }}u + {{ at[3] }} / 4u, {{ at[1] }}u);
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{% macro store(sums, down, along, at) %}
{% if emulated %}
{% call _each_held(down, along) %}
        let x = {{ at[2] }} + i;
        let y = {{ at[3] }} + j;
        tiles[{{ at[0] }}u + x * {{ at[1] }}u + y / 4u][y % 4u] = bitcast<u32>({{ sums }}[at]);
{% endcall %}
{% else %}
{% for i in range(down) %}
{% for j in range(along) %}
    subgroupMatrixStore<row_major>(&tiles, {{ at[0] + i * m * at[1] + j * n // 4 }}u + {{ at[2] }} * {{ at[1] }}u + {{ at[3] }} / 4u, {{ sums }}_{{ i }}_{{ j }}, {{ at[1] }}u);
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# How subgroups share `chunk` rows of `width` columns: `down` is 1; team_row and team_column, a subgroup's first; the condition that
   it has any. #}
{% macro along_of(width) %}{{ [width // n * (chunk // m) // subgroups, 1] | max }}{% endmacro %}
{% macro team_row() %}(team % {{ chunk // m }}u * {{ m }}u){% endmacro %}
{% macro team_column(width) %}(team / {{ chunk // m }}u * {{ along_of(width) | int * n }}u){% endmacro %}
{% macro team_works(width) %}{% if width // n * (chunk // m) < subgroups %}if (team < {{ width // n * (chunk // m) }}u) {% endif %}{% endmacro %}

{# Declares `scale` for what has `most` as its largest in any lane. `slot`, a variable that begins at 0, says where lanes agree: a
   barrier must come between this and the next time. #}
{% macro agree(scale="scale") %}
        atomicMax(&largest[slot], bitcast<u32>(most));
        workgroupBarrier();
        let {{ scale }} = scale_of(atomicLoad(&largest[slot]));
        slot = 1u - slot;
        if (lane == 0u) { atomicStore(&largest[slot], 0u); }
{% endmacro %}

{# Reads a tile, brings its largest near 2^8 and writes it; declares `scale`. `most` and `slot` are variables. #}
{% macro scaled_tile(name, rows, across, buffer, at, to, scale="scale", factor="", all_rows=false) %}
    {{ fetch(name, rows, across, buffer, at, factor, all_rows) }}
        most = 0.0;
    {{ largest_fetched(name, rows, across) }}
    {{ agree(scale) }}
    {{ put(name, rows, across, to, scale) }}
{% endmacro %}

{# `chunk` rows of `width` columns = a · b, as of `multiply`, which become f32 at `to`; barriers before, between and after. #}
{% macro product(width, a, b, depth, to) %}
{% set along = along_of(width) | int %}
        workgroupBarrier();
    {{ zero("out", 1, along) }}
        {{ team_works(width) }}
        {
    {{ multiply("out", 1, along, [a[0], a[1], team_row(), a[2]], [b[0], b[1], team_column(width), b[2]], depth) }}
        }
        workgroupBarrier();
        {{ team_works(width) }}
        {
    {{ store("out", 1, along, [to, width // 4 + 1, team_row(), team_column(width)]) }}
        }
        workgroupBarrier();
{% endmacro %}
