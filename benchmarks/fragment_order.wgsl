{#
A probe's product on matrix units: out[m, n] = Σ_k x[m, k] · w[n, k], f16 factors, f32 sums and results.
Either side goes through workgroup memory (rows of x, w [rows, K]), or lies in memory in the order of fragments,
each whole and one after the other along K, from where subgroups load it.
#}
enable f16;
enable subgroups;
enable chromium_experimental_subgroup_matrix;

alias Left = subgroup_matrix_left<f16, {{ k }}, {{ m }}>;
alias Right = subgroup_matrix_right<f16, {{ n }}, {{ k }}>;
alias Result = subgroup_matrix_result<f32, {{ n }}, {{ m }}>;

@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> w: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> out: array<f32>;

{% set teams_x = tile_columns // team_columns %}
{% set teams_y = tile_rows // team_rows %}
{% set lanes = teams_x * teams_y * subgroup_lanes %}
{% set eights = depth // 8 %}
{% set lines = lanes // eights %}
{% set row_fragments = team_rows // m %}
{% set column_fragments = team_columns // n %}
{% set line_step = eights + 1 %}
{% set left_block, right_block = m * k // 8, n * k // 8 %}
{% if not x_in_order %}
var<workgroup> x_tile: array<vec4<u32>, {{ tile_rows * line_step }}>;
{% endif %}
{% if not w_in_order %}
var<workgroup> w_tile: array<vec4<u32>, {{ tile_columns * line_step }}>;
{% endif %}

{% macro fetch(side, rows, first, at) %}
{% for i in range(rows // lines) %}
        {{ side }}_{{ i }} = {{ side }}[({{ first }} + line + {{ i * lines }}u) * {{ K // 8 }}u + {{ at }} / 8u + lane % {{ eights }}u];
{% endfor %}
{% endmacro %}
{% macro keep(side, rows) %}
{% for i in range(rows // lines) %}
        {{ side }}_tile[(line + {{ i * lines }}u) * {{ line_step }}u + lane % {{ eights }}u] = {{ side }}_{{ i }};
{% endfor %}
{% endmacro %}
{% macro load_left(i, step, at) %}
{% if x_in_order %}
subgroupMatrixLoad<Left, row_major>(&x, (left_first + {{ i * (K // k) }}u + {{ at }} / {{ k }}u + {{ step }}u) * {{ left_block }}u, {{ k // 8 }}u)
{%- else %}
subgroupMatrixLoad<Left, row_major>(&x_tile, (team_row + {{ i * m }}u) * {{ line_step }}u + {{ step * k // 8 }}u, {{ line_step }}u)
{%- endif %}
{% endmacro %}
{% macro load_right(j, step, at) %}
{% if w_in_order %}
subgroupMatrixLoad<Right, col_major>(&w, (right_first + {{ j * (K // k) }}u + {{ at }} / {{ k }}u + {{ step }}u) * {{ right_block }}u, {{ k // 8 }}u)
{%- else %}
subgroupMatrixLoad<Right, col_major>(&w_tile, (team_column + {{ j * n }}u) * {{ line_step }}u + {{ step * k // 8 }}u, {{ line_step }}u)
{%- endif %}
{% endmacro %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
    @builtin(subgroup_id) team: u32,
) {
    // Tiles in bands of {{ band }} rows, so that those at work together share what they read.
    let in_band = group.x % {{ band * (N // tile_columns) }}u;
    let first_row = (group.x / {{ band * (N // tile_columns) }}u * {{ band }}u + in_band % {{ band }}u) * {{ tile_rows }}u;
    let first_column = in_band / {{ band }}u * {{ tile_columns }}u;
    let team_row = team / {{ teams_x }}u * {{ team_rows }}u;
    let team_column = team % {{ teams_x }}u * {{ team_columns }}u;
{% if eights == 4 and lanes % 32 == 0 %}
    let line = ((lane / 4u) & ~7u) | (((lane / 4u) & 1u) << 2u) | ((lane / 8u) & 3u);
{% else %}
    let line = lane / {{ eights }}u;
{% endif %}
{% if x_in_order %}
    let left_first = (first_row + team_row) / {{ m }}u * {{ K // k }}u;
{% else %}
{% for i in range(tile_rows // lines) %}
    var x_{{ i }}: vec4<u32>;
{% endfor %}
{{ fetch("x", tile_rows, "first_row", "0u") }}
{% endif %}
{% if w_in_order %}
    let right_first = (first_column + team_column) / {{ n }}u * {{ K // k }}u;
{% else %}
{% for i in range(tile_columns // lines) %}
    var w_{{ i }}: vec4<u32>;
{% endfor %}
{{ fetch("w", tile_columns, "first_column", "0u") }}
{% endif %}
{% for i in range(row_fragments) %}{% for j in range(column_fragments) %}
    var sum_{{ i }}_{{ j }} = Result();
{% endfor %}{% endfor %}
{% if ahead %}
{% for j in range(column_fragments) %}
    var next_{{ j }} = {{ load_right(j, 0, "0u") }};
{% endfor %}
{% endif %}

    for (var at_k = 0u; at_k < {{ K }}u; at_k += {{ depth }}u) {
        let after = select(at_k, at_k + {{ depth }}u, at_k + {{ depth }}u < {{ K }}u);
{% if not (x_in_order and w_in_order) %}
        workgroupBarrier();
{% if not x_in_order %}
{{ keep("x", tile_rows) }}
{% endif %}
{% if not w_in_order %}
{{ keep("w", tile_columns) }}
{% endif %}
        workgroupBarrier();
{% if not x_in_order %}
{{ fetch("x", tile_rows, "first_row", "after") }}
{% endif %}
{% if not w_in_order %}
{{ fetch("w", tile_columns, "first_column", "after") }}
{% endif %}
{% endif %}
{% for step in range(depth // k) %}
        {
{% for j in range(column_fragments) %}
            let right_{{ j }} = {{ "next_%d" % j if ahead else load_right(j, step, "at_k") }};
{% endfor %}
{% if ahead %}
{% for j in range(column_fragments) %}
            next_{{ j }} = {{ load_right(j, step + 1, "at_k") if step + 1 < depth // k else load_right(j, 0, "after") }};
{% endfor %}
{% endif %}
{% for i in range(row_fragments) %}
            let left_{{ i }} = {{ load_left(i, step, "at_k") }};
{% for j in range(column_fragments) %}
            sum_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate(left_{{ i }}, right_{{ j }}, sum_{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
    }
{% for i in range(row_fragments) %}{% for j in range(column_fragments) %}
    subgroupMatrixStore<row_major>(&out, (first_row + team_row + {{ i * m }}u) * {{ N }}u + first_column + team_column + {{ j * n }}u, sum_{{ i }}_{{ j }}, {{ N }}u);
{% endfor %}{% endfor %}
}
