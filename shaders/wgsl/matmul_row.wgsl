// The quantized matmul for a few rows of x (text generation has one): every weight is read once.
//
//   out[m, n] = epilogue(Σ_k x[m, k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r]),   m < {{ lane_rows }}
//
// Bindings in matmul_bindings.wgsl: x [rows, x_stride], weights (words of W), out [rows, out_stride],
// low [rows, low_stride], factor (B [n, rank]). {{ share }} lanes share the sums of four columns: a lane adds its
// vec4s of the low-rank part and then its eights of the contraction, those at part, part + {{ share }}, …; the
// lanes' sums meet in a tree in workgroup memory. A workgroup has {{ lanes // share }} such quads of columns.

{% include "matmul_bindings.wgsl" %}

const lanes = {{ lanes }}u;
const share = {{ share }}u;
{% if share > 1 %}
var<workgroup> sums: array<vec4<f32>, {{ lanes * lane_rows }}>; // [row][lane]
{% endif %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    if (extent.rows == 0u) { return; }
    let part = lane % share;
    let first = ((group.x + group.y * groups.x) * lanes + lane) / share * 4u;
    // Lanes past the end compute the last quad once more and do not store it: barriers follow.
    let column = min(first, n_columns - 4u);
{% for i in range(lane_rows) %}
    let row_{{ i }} = min({{ i }}u, extent.rows - 1u);
    var sum_{{ i }} = vec4<f32>();
{% endfor %}

{% for member in members %}
    if (column >= {{ member.start }}u && column < {{ member.stop }}u) {
        let at = (column - {{ member.start }}u + {{ member.factor_start }}u) * {{ rank // 4 }}u;
        for (var k = part; k < {{ rank // 4 }}u; k += share) {
{% for j in range(4) %}
            let w_{{ j }} = {{ scale }} * factor[at + {{ j * rank // 4 }}u + k];
{% endfor %}
{% for i in range(lane_rows) %}
            let v_{{ i }} = low[row_{{ i }} * {{ low_stride // 4 }}u + {{ member.low_start // 4 }}u + k];
            sum_{{ i }} += vec4(dot(v_{{ i }}, w_0), dot(v_{{ i }}, w_1), dot(v_{{ i }}, w_2), dot(v_{{ i }}, w_3));
{% endfor %}
        }
    }
{% endfor %}

    for (var k = 8u * part; k < contraction; k += 8u * share) {
{% for i in range(lane_rows) %}
        let at_{{ i }} = (row_{{ i }} * x_stride + k) / 4u;
        let va_{{ i }} = x[at_{{ i }}];
{% if contraction % 8 %}
        let vb_{{ i }} = select(vec4<f32>(), x[at_{{ i }} + 1u], k + 4u < contraction);
{% else %}
        let vb_{{ i }} = x[at_{{ i }} + 1u];
{% endif %}
{% endfor %}
{% for j in range(4) %}
        let w_{{ j }} = decode8(column + {{ j }}u, k);
{% endfor %}
{% for i in range(lane_rows) %}
        sum_{{ i }} += vec4(
{% for j in range(4) %}
            dot(va_{{ i }}, w_{{ j }}.a) + dot(vb_{{ i }}, w_{{ j }}.b),
{% endfor %}
        );
{% endfor %}
    }

{% if share > 1 %}
{% for i in range(lane_rows) %}
    sums[{{ i * lanes }}u + lane] = sum_{{ i }};
{% endfor %}
    workgroupBarrier();
    for (var stride = share / 2u; stride > 0u; stride /= 2u) {
        if (part < stride) {
{% for i in range(lane_rows) %}
            sums[{{ i * lanes }}u + lane] += sums[{{ i * lanes }}u + lane + stride];
{% endfor %}
        }
        workgroupBarrier();
    }
    if (part > 0u) { return; }
{% for i in range(lane_rows) %}
    sum_{{ i }} = sums[{{ i * lanes }}u + lane];
{% endfor %}
{% endif %}
    if (first >= n_columns) { return; }
{% for i in range(lane_rows) %}
    if ({{ i }}u < extent.rows) { store({{ i }}u, column, sum_{{ i }}); }
{% endfor %}
}
