{% set quads = block // 4 %}
{% set rows = block * teams %}
{% set lanes = team_lanes * teams %}
{% set eights_at_once = team_lanes if whole_eights else team_lanes // 2 %}
// The length of each adapted row of W + s · B · A (Liu et al. 2024, "DoRA"), from the sum itself:
//   length_j² = Σ_k (W[j, k] + s_g Σ_r B[j, r] · A[g · {{ rank }} + r, k])²
// inverse[j] = 1 / length_j (0 of a row of zeros), scale[j] = power[j] = magnitude[j] · inverse[j].
//
// Of {{ n_matrices }} matrices of one shape, or parts of them that begin at row {{ first_feature }}. Bindings: weights_i (words of each),
// factors (a stretch of the adapter), lengths (of all groups), places [matrices]: where A, in vec4s, B and the
// magnitudes begin in factors, and the scales in lengths; inverses lie {{ inverses_at }} further on, the part's powers {{ powers_at }}.
// What belongs to no adapted row stays as it is. A workgroup has {{ rows }} rows of one member{% if staged %}, whose words it reads first{% endif %}, a team of
// {{ team_lanes }} lanes {{ block }} of them. What is read of A counts for all rows of a team, and the other teams find it in the cache. A lane
// takes {{ "eight columns" if whole_eights else "half of an eight of columns" }} at once, {{ 8 * eights_at_once }} apart, r in order, and the lanes of a team meet in row_sum.

{# Of weights: a staged one by its place in workgroup memory. #}
{% macro row(i) %}{{ "" if staged else "first + " }}min(team * {{ block }}u + {{ i }}u, last){% endmacro %}
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
var<workgroup> weights: array<u32, {{ rows * row_words + 4 }}>; // of the workgroup's rows, and what an eight may read behind
{% endif %}

{% include "decode/" ~ quantization ~ ".wgsl" %}
{% set block_type = "mat%dx4<f32>" % quads %}
{# In turns, which takes less of a workgroup's memory, where row_sum may be called more than once. #}
{% set in_turns = team_lanes > 32 %}
{% set sum_type = "vec4<f32>" if in_turns else block_type %}
{% set sum_lanes = team_lanes %}
{% include "parts/row_sum.wgsl" %}
{% set n_groups = members[-1].first_group + members[-1].n_groups %}

var<workgroup> coefficients: array<{{ block_type }}, {{ teams * rank }}>; // s_g · B, of each team's rows

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
    var first = {{ members[0].start }}u + index * {{ rows }}u; // of the part's rows
    var stop = {{ members[0].stop }}u;
    var low = {{ members[0].low_start }}u; // of A's rows
    var factor = {{ members[0].factor_start }}u + index * {{ rows }}u; // of B's rows
    var scale = {{ members[0].scale }};
{% for m in members[1:] %}
    if (index >= {{ m.first_group }}u) {
        first = {{ m.start }}u + (index - {{ m.first_group }}u) * {{ rows }}u;
        stop = {{ m.stop }}u;
        low = {{ m.low_start }}u;
        factor = {{ m.factor_start }}u + (index - {{ m.first_group }}u) * {{ rows }}u;
        scale = {{ m.scale }};
    }
{% endfor %}
    let last = stop - 1u - first; // of the rows that there are
    let team = lane / {{ team_lanes }}u;
    let team_lane = lane % {{ team_lanes }}u;
{% set b_turns = -(-rows * rank // lanes) %}
{% for u in range(b_turns) %}
    let b_{{ u }} = number(place.y + (factor + min((lane + {{ u * lanes }}u) / {{ rank }}u, last)) * {{ rank }}u + (lane + {{ u * lanes }}u) % {{ rank }}u);
{% endfor %}
{% if staged %}
    // Loads of a matrix are under way together, and with those of B: none is behind a branch of its own.
    let begin = first * row_words;
    let most = begin + (last + 1u) * row_words - 1u; // of rows that there are
{% for i in range(n_matrices) %}
    {{ "if" if i == 0 else "} else if" }} (matrix == {{ i }}u) {
{% for n in range(0, rows * row_words, 8 * lanes) %}
{% set loads = [8, -(-(rows * row_words - n) // lanes)] | min %}
{% for k in range(loads) %}
        let word_{{ n }}_{{ k }} = weights_{{ i }}[min(begin + {{ n + k * lanes }}u + lane, most)];
{% endfor %}
{% for k in range(loads) %}
{% set all_lanes = n + (k + 1) * lanes <= rows * row_words %}
        {{ "" if all_lanes else "if (%du + lane < %du) { " % (n + k * lanes, rows * row_words) }}weights[{{ n + k * lanes }}u + lane] = word_{{ n }}_{{ k }};{{ "" if all_lanes else " }" }}
{% endfor %}
{% endfor %}
{% endfor %}
    }
{% endif %}
{% for u in range(b_turns) %}
    {{ "if (lane < %du) " % (rows * rank - u * lanes) if (u + 1) * lanes > rows * rank }}{
        let row = (lane + {{ u * lanes }}u) / {{ rank }}u;
        let r = (lane + {{ u * lanes }}u) % {{ rank }}u;
        coefficients[row / {{ block }}u * {{ rank }}u + r][row % {{ block }}u / 4u][row % 4u] = scale * b_{{ u }};
    }
{% endfor %}
    workgroupBarrier();
{% set halves = ["a", "b"] if whole_eights else ["a"] %}
    var sum = {{ block_type }}();
{% if whole_eights %}
    for (var column = 8u * team_lane; column < columns; column += {{ 8 * team_lanes }}u) {
        let behind = select(0u, 1u, column + 4u < columns); // of four columns that there are
{% for i in range(block) %}
        let w_{{ i }} = decode8({{ row(i) }}, column);
        var a_{{ i }} = w_{{ i }}.a;
        var b_{{ i }} = w_{{ i }}.b;
{% endfor %}
{% else %}
    let upper = team_lane >= {{ eights_at_once }}u; // of an eight: neighbouring lanes have the same half
    for (var eight = team_lane % {{ eights_at_once }}u; 8u * eight + select(0u, 4u, upper) < columns; eight += {{ eights_at_once }}u) {
        let column = 8u * eight + select(0u, 4u, upper);
{% for i in range(block) %}
        var a_{{ i }}: vec4<f32>;
{% endfor %}
        if (upper) {
{% for i in range(block) %}
            a_{{ i }} = decode8({{ row(i) }}, 8u * eight).b;
{% endfor %}
        } else {
{% for i in range(block) %}
            a_{{ i }} = decode8({{ row(i) }}, 8u * eight).a;
{% endfor %}
        }
{% endif %}
        for (var r = 0u; r < {{ rank }}u; r += {{ unrolled }}u) {
            let at = place.x + ((low + r) * columns + column) / 4u;
{% for u in range(unrolled) %}
{% for half in halves %}
            let of_{{ half }}_{{ u }} = factors[at + {{ u }}u * (columns / 4u){{ " + behind" if half == "b" }}];
{% endfor %}
{% endfor %}
{% for u in range(unrolled) %}
            let c_{{ u }} = coefficients[team * {{ rank }}u + r + {{ u }}u];
{% for i in range(block) %}
{% for half in halves %}
            {{ half }}_{{ i }} += c_{{ u }}[{{ i // 4 }}][{{ i % 4 }}] * of_{{ half }}_{{ u }};
{% endfor %}
{% endfor %}
{% endfor %}
        }
{% for half in halves %}
        sum += {{ "f32(behind) * " if half == "b" }}{{ block_type }}({% for i in range(block) %}dot({{ half }}_{{ i }}, {{ half }}_{{ i }}){{ ", " if not loop.last }}{% endfor %});
{% endfor %}
    }
{% if in_turns %}
    let squares = {{ block_type }}({% for q in range(quads) %}row_sum(sum[{{ q }}], lane){{ ", " if not loop.last }}{% endfor %});
{% else %}
    let squares = row_sum(sum, lane);
{% endif %}
    let own = team * {{ block }}u + team_lane; // of the workgroup's rows
    if (team_lane >= {{ block }}u || own > last) { return; }
    let square = squares[team_lane / 4u][team_lane % 4u];
    let inverse = select(0.0, 1.0 / sqrt(square), square > 0.0);
    let scaled = number(place.z + factor + own) * inverse;
    let to = place.w + first + own;
    lengths[to + {{ first_feature }}u] = scaled;
    lengths[to + {{ inverses_at + first_feature }}u] = inverse;
    lengths[to + {{ powers_at }}u] = scaled;
}
