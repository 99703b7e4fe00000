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
// at a time) in named accumulators; the lanes' sums meet in a tree in workgroup memory.

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
{% set quads = block_columns // 4 %}
const n_sums = {{ block_rows * quads }}u;

var<workgroup> sums: array<vec4<f32>, {{ lanes * block_rows * quads }}>; // [n_sums, lanes]

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

    for (var k = 4u * lane; k < length; k += 4u * lanes) {
{% for i in range(block_rows) %}
        let v_{{ i }} = x[x_{{ i }} + k / 4u];
{% endfor %}
{% if transposed %}
{% for q in range(4) %}
{% for c in range(quads) %}
        {
            let f = factor[((factor_row + k + {{ q }}u) * {{ factor_stride }}u + column) / 4u + {{ c }}u];
{% for i in range(block_rows) %}
            sum_{{ i }}_{{ c }} += v_{{ i }}[{{ q }}] * f;
{% endfor %}
        }
{% endfor %}
{% endfor %}
{% else %}
{% for c in range(quads) %}
        {
            let at = ((factor_row + column + {{ 4 * c }}u) * {{ factor_stride }}u + k) / 4u;
{% for j in range(4) %}
            let f_{{ j }} = factor[at + {{ j * factor_stride // 4 }}u];
{% endfor %}
{% for i in range(block_rows) %}
            sum_{{ i }}_{{ c }} += vec4(dot(v_{{ i }}, f_0), dot(v_{{ i }}, f_1), dot(v_{{ i }}, f_2), dot(v_{{ i }}, f_3));
{% endfor %}
        }
{% endfor %}
{% endif %}
    }

{% for i in range(block_rows) %}
{% for c in range(quads) %}
    sums[{{ (i * quads + c) * lanes }}u + lane] = sum_{{ i }}_{{ c }};
{% endfor %}
{% endfor %}
    workgroupBarrier();
    for (var stride = lanes / 2u; stride > 0u; stride /= 2u) {
        for (var i = lane; i < n_sums * stride; i += lanes) {
            let at = i / stride * lanes + i % stride;
            sums[at] += sums[at + stride];
        }
        workgroupBarrier();
    }
    for (var i = lane; i < n_sums; i += lanes) {
        let row = first_row + i / {{ quads }}u;
        if (row < extent.rows) {
            let at = (row * {{ members | length * columns }}u + member * {{ columns }}u + column) / 4u;
            z[at + i % {{ quads }}u] = {{ scale }} * sums[i * lanes];
        }
    }
}
