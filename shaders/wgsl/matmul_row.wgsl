// The quantized matmul for a few rows of x (text generation has one): every weight is read once.
//
//   out[m, n] = epilogue(Σ_k x[m, k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r]),   m < {{ lane_rows }}
//
// Bindings in matmul_bindings.wgsl: x [rows, x_stride], weights (words of W), out [rows, out_stride],
// low [rows, low_stride], factor (B [n, rank]). {{ share }} lanes share the sums of four columns: a lane adds its
// vec4s of the low-rank part and then its eights of the contraction, those at part, part + {{ share }}, … in this
// order; the lanes' sums meet in a tree of branches of up to {{ branches }} in workgroup memory. A workgroup has
// {{ lanes // share }} such quads of columns. A lane's loop is written out {{ steps }} eights at a time, whose loads do not
// wait for one another: what a GPU reads in a second grows with the bytes it has in flight.

{% include "matmul_bindings.wgsl" %}

const lanes = {{ lanes }}u;
const share = {{ share }}u;
{% if share > 1 %}
var<workgroup> sums: array<vec4<f32>, {{ lanes * lane_rows }}>; // [row][lane]
{% endif %}

{# The lane's next n eights, the first of them at k; half_eight: the last four weights of an odd width. #}
{% macro add_eights(n, half_eight=False) %}
{% for s in range(n) %}
{% set k = "(k + " ~ 8 * s * share ~ "u)" if s else "k" %}
{% for i in range(lane_rows) %}
        let at_{{ s }}_{{ i }} = (row_{{ i }} * x_stride + {{ k }}) / 4u;
        let va_{{ s }}_{{ i }} = x[at_{{ s }}_{{ i }}];
{% if half_eight %}
        let vb_{{ s }}_{{ i }} = select(vec4<f32>(), x[at_{{ s }}_{{ i }} + 1u], {{ k }} + 4u < contraction);
{% else %}
        let vb_{{ s }}_{{ i }} = x[at_{{ s }}_{{ i }} + 1u];
{% endif %}
{% endfor %}
{% for j in range(4) %}
        let w_{{ s }}_{{ j }} = decode8(column + {{ j }}u, {{ k }});
{% endfor %}
{% endfor %}
{% for s in range(n) %}
{% for i in range(lane_rows) %}
        sum_{{ i }} += vec4(
{% for j in range(4) %}
            dot(va_{{ s }}_{{ i }}, w_{{ s }}_{{ j }}.a) + dot(vb_{{ s }}_{{ i }}, w_{{ s }}_{{ j }}.b),
{% endfor %}
        );
{% endfor %}
{% endfor %}
{% endmacro %}

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

{# Every lane has `whole` eights, the first rounds × steps of them in rounds; some lanes have one more. #}
{% set whole = contraction // 8 // share %}
{% set rounds = whole // steps %}
{% set rest = whole % steps %}
{% if rounds > 1 %}
    for (var k = 8u * part; k < {{ 8 * share * rounds * steps }}u; k += {{ 8 * share * steps }}u) {
{{ add_eights(steps) }}
    }
{% elif rounds == 1 %}
    {
        let k = 8u * part;
{{ add_eights(steps) }}
    }
{% endif %}
{% if rest %}
    {
        let k = 8u * (part + {{ share * rounds * steps }}u);
{{ add_eights(rest) }}
    }
{% endif %}
{% if whole * share * 8 < contraction %}
    {
        let k = 8u * (part + {{ share * whole }}u);
        if (k < contraction) {
{{ add_eights(1, contraction % 8 > 0) }}
        }
    }
{% endif %}

{% if share > 1 %}
{# Level by level: sums of lanes past the first `width` join those of the lanes before. #}
{% set level = namespace(width=share) %}
{% for _ in range(8) %}
{% if level.width > 1 %}
{% set ways = [branches, level.width] | min %}
{% set width = level.width // ways %}
    if (part >= {{ width }}u && part < {{ level.width }}u) {
{% for i in range(lane_rows) %}
        sums[{{ i * lanes }}u + lane] = sum_{{ i }};
{% endfor %}
    }
    workgroupBarrier();
    if (part < {{ width }}u) {
{% for i in range(lane_rows) %}
{% for way in range(1, ways) %}
        sum_{{ i }} += sums[{{ i * lanes + way * width }}u + lane];
{% endfor %}
{% endfor %}
    }
{% set level.width = width %}
{% endif %}
{% endfor %}
    if (part > 0u) { return; }
{% endif %}
    if (first >= n_columns) { return; }
{% for i in range(lane_rows) %}
    if ({{ i }}u < extent.rows) { store({{ i }}u, column, sum_{{ i }}); }
{% endfor %}
}
