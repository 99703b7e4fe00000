// For stretch p of the columns of row m, {{ columns }} of them:
//   sums[m, p] = (top = max_v logits[m, v],   Σ_v exp(logits[m, v] − top),
//                 the highest logit of the stretch in a column before the label's, the label's logit);
// the last where the label lies in the stretch, and both the lowest number where there is none.
{% if smoothing %}
// A second vec4 behind it begins with Σ_v logits[m, v].
{% endif %}
//
// Bindings: logits [chunk, {{ stride }}] of which {{ vocab_size }} columns count, labels u32 [chunk],
// sums [chunk, {{ n_stretches }}, {{ 8 if smoothing else 4 }}]. One workgroup a row and stretch. A lane takes {{ quads }} quads of columns at
// once, {{ lanes }} apart, and keeps a maximum and the sum of exponentials relative to it; the lanes meet in
// row_max and row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> logits: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> labels: array<u32>;
@group(0) @binding(3) var<storage, read_write> sums: array<vec4<f32>>;

const lowest = -3.4e38;
{% set n_quads = (vocab_size + 3) // 4 %}

{% include "parts/row_sum.wgsl" %}
{% set reduction = "max" %}
{% set sum_type = "vec2<f32>" %}

{% include "parts/row_sum.wgsl" %}

fn highest_of(v: vec4<f32>) -> f32 { return max(max(v.x, v.y), max(v.z, v.w)); }

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let row = index / {{ n_stretches }}u;
    if (row >= extent.rows) { return; }
    let stretch = index % {{ n_stretches }}u;
    let base = row * {{ stride // 4 }}u;
    let label = labels[row];

    var highest = lowest;
    var before = lowest; // of quads before the label's
    var sum = vec4<f32>();
{% if smoothing %}
    var plain = vec4<f32>();
{% endif %}
    var quad = stretch * {{ columns // 4 }}u + lane;
{% if steps > 1 %}
    let last_quad = min((stretch + 1u) * {{ columns // 4 }}u, {{ n_quads }}u);
    for (; quad < last_quad; quad += {{ lanes * quads }}u)
{% endif %}
    {
{% for q in range(quads) %}
        var value_{{ q }} = vec4(lowest);
        if (quad < {{ [n_quads - q * lanes, 0] | max }}u) { value_{{ q }} = logits[base + quad + {{ q * lanes }}u]; }
{% if vocab_size % 4 %}
        if (quad + {{ q * lanes }}u == {{ n_quads - 1 }}u) {
            value_{{ q }} = select(value_{{ q }}, vec4(lowest), vec4(0u, 1u, 2u, 3u) >= vec4({{ vocab_size % 4 }}u));
        }
{% endif %}
{% endfor %}
        let former = highest;
{% for q in range(quads) %}
        let highest_{{ q }} = highest_of(value_{{ q }});
        highest = max(highest, highest_{{ q }});
        before = max(before, select(lowest, highest_{{ q }}, quad + {{ q * lanes }}u < label / 4u));
{% endfor %}
        sum *= exp(former - highest);
{% for q in range(quads) %}
        sum += exp(value_{{ q }} - highest);
{% endfor %}
{% if smoothing %}
{% for q in range(quads) %}
        plain += select(value_{{ q }}, vec4(0.0), value_{{ q }} == vec4(lowest)); // past the vocabulary
{% endfor %}
{% endif %}
    }
    let tops = row_max(vec2(highest, before), lane);
    let total = row_sum(dot(sum, vec4(1.0)) * exp(highest - tops.x), lane);
{% if smoothing %}
    let whole = row_sum(dot(plain, vec4(1.0)), lane);
    if (lane == 0u) { sums[2u * index + 1u] = vec4(whole, 0.0, 0.0, 0.0); }
{% endif %}
    if (lane == 0u) {
        var result = vec4(tops.x, total, tops.y, lowest);
        if (label / {{ columns }}u == stretch) {
            let own = logits[base + label / 4u];
            result.w = own[label % 4u];
            let earlier = select(vec4(lowest), own, vec4(0u, 1u, 2u, 3u) < vec4(label % 4u));
            result.z = max(result.z, highest_of(earlier));
        }
        sums[{{ "2u * " if smoothing }}index] = result;
    }
}
