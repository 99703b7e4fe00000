// The body without workgroup memory, for devices that run on the CPU (see matmul_tiled.wgsl for
// the formula and the bindings). A lane holds {{ lane_rows }} rows × 8 columns of the output in
// named accumulators; the contraction runs in order, the low-rank part first, then the weight.

{% include "parts/matmul_bindings.wgsl" %}
{% set decode = "powered8" if powered else "decode8" %}

const lane_rows = {{ lane_rows }}u;
const column_blocks = {{ (n_columns + 7) // 8 }}u;

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    // Neighbouring lanes share rows and differ in columns.
    let index = (group.x + group.y * groups.x) * {{ lanes }}u + lane;
    let first_row = index / column_blocks * lane_rows;
    let column = index % column_blocks * 8u;
    if (first_row >= extent.rows) { return; }
    let last_row = extent.rows - 1u;
    let x_column = {{ "place.x_column" if placed else "0u" }};
{% for i in range(lane_rows) %}
    let row_{{ i }} = min(first_row + {{ i }}u, last_row);
    var a_{{ i }} = vec4<f32>();
    var b_{{ i }} = vec4<f32>();
{% endfor %}

{% if members and transposed %}
    // + d_z · A, whose members lie one after another in both.
    for (var k = 0u; k < {{ members | length * rank }}u; k += 4u) {
{% for i in range(lane_rows) %}
        let v_{{ i }} = {{ "powers[factor_power_at] * " if powered }}low[(row_{{ i }} * {{ low_stride }}u + k) / 4u];
{% endfor %}
{% for q in range(4) %}
        {
            let at = ((k + {{ q }}u) * n_columns + column) / 4u;
            let wa = factor[at];
            let wb = factor[at + 1u];
{% for i in range(lane_rows) %}
            a_{{ i }} += v_{{ i }}[{{ q }}] * wa;
            b_{{ i }} += v_{{ i }}[{{ q }}] * wb;
{% endfor %}
        }
{% endfor %}
    }
{% elif members %}
    // + scale · z · Bᵀ of the member that has these columns, if one has: drivers take long to compile
    // one loop a member.
{% for half, name in ((0, "a"), (4, "b")) %}
    {
        let first = column + {{ half }}u;
        var factor_row = 0u;
        var low_quad = 0u;
        var turns = 0u;
{% for member in members %}
        if (first >= {{ member.start }}u && first < {{ member.stop }}u) {
            factor_row = first - {{ member.start }}u + {{ member.factor_start }}u;
            low_quad = {{ member.low_start // 4 }}u;
            turns = {{ rank // 4 }}u;
        }
{% endfor %}
        let at = factor_row * {{ rank // 4 }}u;
        for (var k = 0u; k < turns; k += 1u) {
{% for j in range(4) %}
            let w_{{ j }} = {{ scale }} * factor[at + {{ j * rank // 4 }}u + k];
{% endfor %}
{% for i in range(lane_rows) %}
            let v_{{ i }} = {{ "powers[factor_power_at] * " if powered }}low[row_{{ i }} * {{ low_stride // 4 }}u + low_quad + k];
            {{ name }}_{{ i }} += vec4(dot(v_{{ i }}, w_0), dot(v_{{ i }}, w_1), dot(v_{{ i }}, w_2), dot(v_{{ i }}, w_3));
{% endfor %}
        }
    }
{% endfor %}
{% endif %}

{% if transposed %}
    for (var k = 0u; k < contraction; k += 4u) {
{% for i in range(lane_rows) %}
        let v_{{ i }} = vec4<f32>(x[(row_{{ i }} * x_stride + x_column + k) / 4u]);
{% endfor %}
{% for q in range(4) %}
        {
            let w = {{ decode }}(k + {{ q }}u, column);
{% for i in range(lane_rows) %}
            a_{{ i }} += v_{{ i }}[{{ q }}] * w.a;
            b_{{ i }} += v_{{ i }}[{{ q }}] * w.b;
{% endfor %}
        }
{% endfor %}
    }
{% else %}
    for (var k = 0u; k < contraction; k += 8u) {
{% for i in range(lane_rows) %}
        let at_{{ i }} = (row_{{ i }} * x_stride + x_column + k) / 4u;
        let va_{{ i }} = vec4<f32>(x[at_{{ i }}]);
{% if contraction % 8 %}
        let vb_{{ i }} = select(vec4<f32>(), vec4<f32>(x[at_{{ i }} + 1u]), k + 4u < contraction);
{% else %}
        let vb_{{ i }} = vec4<f32>(x[at_{{ i }} + 1u]);
{% endif %}
{% endfor %}
{% for j in range(8) %}
        {
            let w = {{ decode }}(min(column + {{ j }}u, n_columns - 1u), k);
{% for i in range(lane_rows) %}
            {{ "a" if j < 4 else "b" }}_{{ i }}[{{ j % 4 }}] += dot(va_{{ i }}, w.a) + dot(vb_{{ i }}, w.b);
{% endfor %}
        }
{% endfor %}
    }
{% endif %}

{% for i in range(lane_rows) %}
{% set scaled = " * out_power(row_%d)" % i if powered else "" %}
    if (first_row + {{ i }}u <= last_row) {
        store(row_{{ i }}, column, a_{{ i }}{{ scaled }});
        if (column + 4u < n_columns) { store(row_{{ i }}, column + 4u, b_{{ i }}{{ scaled }}); }
    }
{% endfor %}
}
