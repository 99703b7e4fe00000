// losses[m] = logsumexp(logits[m]) − logits[m, labels[m]];  correct[m] = 1 where the label is the
// argmax (the lowest index wins a tie), else 0; with the gradient, in place:
//   logits[m, v] ← (softmax(logits[m])[v] − [v = label]) · scale,
// and where the logits are capped, cap · tanh(raw / cap), times the cap's slope 1 − (logit / cap)².
//
// Bindings: logits [chunk, stride] (stride ≥ vocab; columns past vocab stay), labels u32 [chunk], losses and correct [chunk]; step.scale is
// 1 / (trained tokens of the optimizer step). One workgroup a row: each lane keeps a running maximum
// and a running sum of exponentials over its columns; they meet in a fixed tree.

struct Extent { rows: u32 }
struct Step { scale: f32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read_write> logits: array<f32>;
@group(0) @binding(2) var<storage, read> labels: array<u32>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;
@group(0) @binding(4) var<storage, read_write> correct: array<f32>;
{% if with_gradient %}
@group(0) @binding(5) var<uniform> step: Step;
{% endif %}

const vocab = {{ vocab_size }}u;
const lanes = {{ lanes }}u;

var<workgroup> maxima: array<f32, lanes>;
var<workgroup> places: array<u32, lanes>;

{% include "row_sum.wgsl" %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= extent.rows) { return; }
    let base = row * {{ stride }}u;
    let label = labels[row];

    var highest = -3.4e38;
    var place = vocab;
    var sum = 0.0;
    for (var v = lane; v < vocab; v += lanes) {
        let value = logits[base + v];
        if (value > highest) {
            sum = sum * exp(highest - value) + 1.0;
            highest = value;
            place = v;
        } else {
            sum += exp(value - highest);
        }
    }
    maxima[lane] = highest;
    places[lane] = place;
    workgroupBarrier();
    for (var stride = lanes / 2u; stride > 0u; stride /= 2u) {
        if (lane < stride) {
            let other = maxima[lane + stride];
            let other_place = places[lane + stride];
            if (other > maxima[lane] || (other == maxima[lane] && other_place < places[lane])) {
                maxima[lane] = other;
                places[lane] = other_place;
            }
        }
        workgroupBarrier();
    }
    let top = maxima[0];
    let total = row_sum(sum * exp(highest - top), lane);
    if (lane == 0u) {
        // The difference first: top + log(total) would be rounded at the size of the logits.
        losses[row] = log(total) + (top - logits[base + label]);
        correct[row] = select(0.0, 1.0, places[0] == label);
    }
{% if with_gradient %}
    workgroupBarrier();
    storageBarrier(); // lane 0 has read the label's logit before it is overwritten
    let factor = step.scale / total;
    for (var v = lane; v < vocab; v += lanes) {
        let logit = logits[base + v];
        var d = exp(logit - top) * factor;
        if (v == label) { d -= step.scale; }
{% if softcap %}
        let capped = logit / {{ softcap }};
        d *= 1.0 - capped * capped;
{% endif %}
        logits[base + v] = d;
    }
{% endif %}
}
