{% set block = 8 %}
{% set quads = block // 4 %}
// The length of each adapted row of W + s · B · A (Liu et al. 2024, "DoRA"), from the sum itself:
//   length_j² = Σ_k (W[j, k] + s_g Σ_r B[j, r] · A[g · {{ rank }} + r, k])²
// inverse[j] = 1 / length_j (0 of a row of zeros), scale[j] = power[j] = magnitude[j] · inverse[j].
//
// Of {{ n_matrices }} matrices of one shape, or parts of them that begin at row {{ first_feature }}. Bindings: weights_i (words of each),
// factors (a stretch of the adapter), lengths (of all groups), places [matrices]: where A, in vec4s, B and the
// magnitudes begin in factors, and the scales in lengths; inverses lie {{ inverses_at }} further on, the part's powers {{ powers_at }}.
// What belongs to no adapted row stays as it is. A workgroup has {{ block }} rows of one member, which share what is read of A{% if staged %}, whose words it reads first{% endif %}; a lane
// takes eight columns at once, {{ 8 * lanes }} apart, r in order, and the lanes meet in row_sum.

struct Eight { a: vec4<f32>, b: vec4<f32> }

{% for i in range(n_matrices) %}
@group(0) @binding({{ i }}) var<storage, read> weights{{ "_%d" % i if staged }}: array<u32>;
{% endfor %}
@group(0) @binding({{ n_matrices }}) var<storage, read> factors: array<vec4<f32>>;
@group(0) @binding({{ n_matrices + 1 }}) var<storage, read> places: array<vec4<u32>>;
@group(0) @binding({{ n_matrices + 2 }}) var<storage, read_write> lengths: array<f32>;

const columns = {{ columns }}u;
const row_words = {{ row_words }}u;
{% if staged %}
var<workgroup> weights: array<u32, {{ block * row_words + 4 }}>; // of the workgroup's rows, and what an eight may read behind

fn word(matrix: u32, at: u32) -> u32 {
{% for i in range(1, n_matrices) %}
    if (matrix == {{ i }}u) { return weights_{{ i }}[at]; }
{% endfor %}
    return weights_0[at];
}
{% endif %}

{% include "decode/" ~ quantization ~ ".wgsl" %}
{% set sum_type = "mat%dx4<f32>" % quads %}
{% include "parts/row_sum.wgsl" %}
{% set n_groups = members[-1].first_group + members[-1].n_groups %}

var<workgroup> coefficients: array<mat{{ quads }}x4<f32>, {{ rank }}>; // s_g · B, of the workgroup's rows

fn number(at: u32) -> f32 { return factors[at / 4u][at % 4u]; }

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let whole = group.x + group.y * groups.x;
    let matrix = whole / {{ n_groups }}u;
    if (matrix >= {{ n_matrices }}u) { return; }
    let index = whole % {{ n_groups }}u;
    let place = places[matrix];
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
    let last = stop - 1u - first; // of the rows that there are
    for (var at = lane; at < {{ block * rank }}u; at += {{ lanes }}u) {
        let row = factor + min(at / {{ rank }}u, last);
        coefficients[at % {{ rank }}u][at / {{ 4 * rank }}u][at / {{ rank }}u % 4u] = scale * number(place.y + row * {{ rank }}u + at % {{ rank }}u);
    }
{% if staged %}
    for (var at = lane; at < {{ block }}u * row_words; at += {{ lanes }}u) {
        weights[at] = word(matrix, (first + min(at / row_words, last)) * row_words + at % row_words);
    }
{% endif %}
    workgroupBarrier();
    var sum = {{ sum_type }}();
    for (var column = 8u * lane; column < columns; column += {{ 8 * lanes }}u) {
        let behind = select(0u, 1u, column + 4u < columns); // of four columns that there are
{% for i in range(block) %}
        let w_{{ i }} = decode8({{ "%du" % i if staged else "first + min(%du, last)" % i }}, column);
        var a_{{ i }} = w_{{ i }}.a;
        var b_{{ i }} = w_{{ i }}.b;
{% endfor %}
        for (var r = 0u; r < {{ rank }}u; r += 1u) {
            let at = place.x + ((low + r) * columns + column) / 4u;
            let of_a = factors[at];
            let of_b = factors[at + behind];
            let c = coefficients[r];
{% for i in range(block) %}
            a_{{ i }} += c[{{ i // 4 }}][{{ i % 4 }}] * of_a;
            b_{{ i }} += c[{{ i // 4 }}][{{ i % 4 }}] * of_b;
{% endfor %}
        }
        sum += {{ sum_type }}({% for i in range(block) %}dot(a_{{ i }}, a_{{ i }}){{ ", " if not loop.last }}{% endfor %});
        sum += f32(behind) * {{ sum_type }}({% for i in range(block) %}dot(b_{{ i }}, b_{{ i }}){{ ", " if not loop.last }}{% endfor %});
    }
    let squares = row_sum(sum, lane);
    if (lane >= {{ block }}u || lane > last) { return; }
    let square = squares[lane / 4u][lane % 4u];
    let inverse = select(0.0, 1.0 / sqrt(square), square > 0.0);
    let scaled = number(place.z + factor + lane) * inverse;
    let to = place.w + first + lane;
    lengths[to + {{ first_feature }}u] = scaled;
    lengths[to + {{ inverses_at + first_feature }}u] = inverse;
    lengths[to + {{ powers_at }}u] = scaled;
}
