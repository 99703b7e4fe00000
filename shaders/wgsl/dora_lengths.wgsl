{% set block = 4 %}
// The length of each adapted row of W + s · B · A (Liu et al. 2024, "DoRA"), from the sum itself:
//   length_j² = Σ_k (W[j, k] + s_g Σ_r B[j, r] · A[g · {{ rank }} + r, k])²
// inverses[j] = 1 / length_j (0 of a row of zeros), scales[j] = powers[j] = magnitudes[j] · inverses[j].
//
// Bindings: weights (words of the part, which begins at row {{ first_feature }} of the matrix), A [members · {{ rank }}, {{ columns }}], B [rows of all
// members, {{ rank }}], magnitudes [rows of all members]; scales and inverses [rows of the matrix], powers [rows of the
// part + 2], of which others stay as they are. A workgroup has {{ block }} rows of one member; a lane takes eight columns at once,
// {{ 8 * lanes }} apart, r in order, and the lanes meet in row_sum.

struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<storage, read> weights: array<u32>;
@group(0) @binding(1) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read> magnitudes: array<f32>;
@group(0) @binding(4) var<storage, read_write> scales: array<f32>;
@group(0) @binding(5) var<storage, read_write> inverses: array<f32>;
@group(0) @binding(6) var<storage, read_write> powers: array<f32>;

const columns = {{ columns }}u;
const row_words = {{ row_words }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}
{% set sum_type = "vec4<f32>" %}
{% include "parts/row_sum.wgsl" %}

var<workgroup> coefficients: array<vec4<f32>, {{ rank }}>; // s_g · B, of the workgroup's rows

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    if (index >= {{ members[-1].first_group + members[-1].n_groups }}u) { return; }
    var first = {{ members[0].start }}u + index * {{ block }}u; // of the part's rows
    var stop = {{ members[0].stop }}u;
    var low = {{ members[0].low_start }}u; // of A's rows
    var factor = {{ members[0].factor_start }}u + index * {{ block }}u; // of B's rows
    var scale = {{ members[0].scale }};
{% for m in members[1:] %}
    if (index >= {{ m.first_group }}u) {
        first = {{ m.start }}u + (index - {{ m.first_group }}u) * {{ block }}u;
        stop = {{ m.stop }}u;
        low = {{ m.low_start }}u;
        factor = {{ m.factor_start }}u + (index - {{ m.first_group }}u) * {{ block }}u;
        scale = {{ m.scale }};
    }
{% endfor %}
    for (var at = lane; at < {{ block * rank }}u; at += {{ lanes }}u) {
        let row = min(at / {{ rank }}u, stop - 1u - first);
        coefficients[at % {{ rank }}u][at / {{ rank }}u] = scale * b[(factor + row) * {{ rank }}u + at % {{ rank }}u];
    }
    workgroupBarrier();
    var sum = vec4<f32>();
    for (var column = 8u * lane; column < columns; column += {{ 8 * lanes }}u) {
        let behind = select(0u, 1u, column + 4u < columns); // of four columns that there are
{% for i in range(block) %}
        let w_{{ i }} = decode8(min(first + {{ i }}u, stop - 1u), column);
        var a_{{ i }} = w_{{ i }}.a;
        var b_{{ i }} = w_{{ i }}.b;
{% endfor %}
        for (var r = 0u; r < {{ rank }}u; r += 1u) {
            let at = ((low + r) * columns + column) / 4u;
            let of_a = a[at];
            let of_b = a[at + behind];
            let c = coefficients[r];
{% for i in range(block) %}
            a_{{ i }} += c[{{ i }}] * of_a;
            b_{{ i }} += c[{{ i }}] * of_b;
{% endfor %}
        }
        sum += vec4({% for i in range(block) %}dot(a_{{ i }}, a_{{ i }}){{ ", " if not loop.last }}{% endfor %});
        sum += f32(behind) * vec4({% for i in range(block) %}dot(b_{{ i }}, b_{{ i }}){{ ", " if not loop.last }}{% endfor %});
    }
    let squares = row_sum(sum, lane);
    if (lane >= {{ block }}u || first + lane >= stop) { return; }
    let square = squares[lane];
    let inverse = select(0.0, 1.0 / sqrt(square), square > 0.0);
    let row = first + lane;
    inverses[{{ first_feature }}u + row] = inverse;
    scales[{{ first_feature }}u + row] = magnitudes[factor + lane] * inverse;
    powers[row] = magnitudes[factor + lane] * inverse;
}
