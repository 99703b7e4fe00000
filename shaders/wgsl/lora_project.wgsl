{% set quads = block_columns // 4 %}
{% set n_sums = block_rows * quads %}
{% set parts = [lanes // 8, 1] | max %}
// z[m, g · columns + j] = scale · Σ_k x[m, x_column_g + k] · F_g[j, k],   k < length_g
{% if transposed %}
// F_g[j, k] = factor[factor_row_g + k, j]
{% else %}
// F_g[j, k] = factor[factor_row_g + j, k]
{% endif %}
//
// Bindings: x [rows, {{ x_stride }}], factor [.., {{ factor_stride }}], z [rows, members · columns].
// Few outputs and a long sum: a workgroup owns {{ block_rows }} rows × {{ block_columns }} columns of one
// member, and its lanes share the contraction. A lane sums k = 4 · lane, 4 · (lane + {{ lanes }}), … (four
// at a time) in named accumulators; the lanes' sums meet in workgroup memory{% if parts > 1 %}: those of 8 lanes, {{ parts }}
// apart, then these {{ parts }} parts{% endif %}. A row's sums do not depend on the block that it is in.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> factor: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> z: array<vec4<f32>>;

const lanes = {{ lanes }}u;
const block_rows = {{ block_rows }}u;
const block_columns = {{ block_columns }}u;
const member_blocks = {{ columns // block_columns }}u; // blocks of columns of a member
const column_blocks = {{ members | length * (columns // block_columns) }}u;

var<workgroup> sums: array<vec4<f32>, {{ lanes * n_sums }}>; // [sums of the block, lanes]

{# Adds `count` steps of the contraction from k on; all are loaded before the first is used. #}
{% macro add_steps(count) %}
{% for u in range(count) %}
{% for i in range(block_rows) %}
        let v_{{ u }}_{{ i }} = x[x_{{ i }} + k / 4u + {{ u * lanes }}u];
{% endfor %}
{% if transposed %}
        let at_{{ u }} = ((factor_row + k + {{ 4 * u * lanes }}u) * {{ factor_stride }}u + column) / 4u;
{% for q in range(4) %}
{% for c in range(quads) %}
        let f_{{ u }}_{{ q }}_{{ c }} = factor[at_{{ u }} + {{ q * factor_stride // 4 + c }}u];
{% endfor %}
{% endfor %}
{% else %}
        let at_{{ u }} = ((factor_row + column) * {{ factor_stride }}u + k) / 4u + {{ u * lanes }}u;
{% for j in range(block_columns) %}
        let f_{{ u }}_{{ j }} = factor[at_{{ u }} + {{ j * factor_stride // 4 }}u];
{% endfor %}
{% endif %}
{% endfor %}
{% for u in range(count) %}
{% for c in range(quads) %}
{% for i in range(block_rows) %}
{% if transposed %}
{% for q in range(4) %}
        sum_{{ i }}_{{ c }} += v_{{ u }}_{{ i }}[{{ q }}] * f_{{ u }}_{{ q }}_{{ c }};
{% endfor %}
{% else %}
        sum_{{ i }}_{{ c }} += vec4({% for j in range(4) %}dot(v_{{ u }}_{{ i }}, f_{{ u }}_{{ 4 * c + j }}){{ ", " if not loop.last }}{% endfor %});
{% endif %}
{% endfor %}
{% endfor %}
{% endfor %}
{% endmacro %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let first_row = index / column_blocks * block_rows;
    if (first_row >= extent.rows) { return; }
    let member = index % column_blocks / member_blocks;
    let column = index % member_blocks * block_columns; // within the member
    var x_column = {{ members[0].x_column }}u;
    var factor_row = {{ members[0].factor_row }}u;
    var length = {{ members[0].length }}u;
{% for m in members[1:] %}
    if (member == {{ loop.index }}u) {
        x_column = {{ m.x_column }}u;
        factor_row = {{ m.factor_row }}u;
        length = {{ m.length }}u;
    }
{% endfor %}
{% for i in range(block_rows) %}
    let x_{{ i }} = (min(first_row + {{ i }}u, extent.rows - 1u) * {{ x_stride }}u + x_column) / 4u;
{% for c in range(quads) %}
    var sum_{{ i }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}

    var k = 4u * lane;
{% if unroll > 1 %}
    for (; k + {{ (unroll - 1) * 4 * lanes }}u < length; k += {{ unroll * 4 * lanes }}u) {
{{ add_steps(unroll) }}
    }
{% endif %}
    for (; k < length; k += {{ 4 * lanes }}u) {
{{ add_steps(1) }}
    }

{% for i in range(block_rows) %}
{% for c in range(quads) %}
    sums[{{ (i * quads + c) * lanes }}u + lane] = sum_{{ i }}_{{ c }};
{% endfor %}
{% endfor %}
    workgroupBarrier();
{% if parts > 1 %}
    for (var task = lane; task < {{ n_sums * parts }}u; task += lanes) {
        let part = task / {{ parts }}u * lanes + task % {{ parts }}u;
        var part_sum = sums[part];
{% for t in range(parts, lanes, parts) %}
        part_sum += sums[part + {{ t }}u];
{% endfor %}
        sums[part] = part_sum; // where no other lane reads
    }
    workgroupBarrier();
{% endif %}
    for (var n = lane; n < {{ n_sums }}u; n += lanes) {
        let row = first_row + n / {{ quads }}u;
        var sum = sums[n * lanes];
{% for t in range(1, parts if parts > 1 else lanes) %}
        sum += sums[n * lanes + {{ t }}u];
{% endfor %}
        if (row < extent.rows) {
            let at = (row * {{ members | length * columns }}u + member * {{ columns }}u + column) / 4u;
            z[at + n % {{ quads }}u] = {{ scale }} * sum;
        }
    }
}
