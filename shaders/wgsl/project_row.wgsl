// z[r] = {{ "scale_g · " if scales }}Σ_k v[k] · A[r, k] for one row, v = x{{ " ∘ norm_weight" if norm }}.
//
// Bindings: x [width], A [members · rank, width], z [members · rank]{{ ", norm_weight [width]" if norm }}.
// One workgroup a row of A: a lane takes the quads of columns lane, lane + {{ lanes }}, … in this order, {{ steps }} of them
// loaded at once; the lanes' sums meet in row_sum.

{% set quads = width // 4 %}
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> factor: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> z: array<f32>;
{% if norm %}
@group(0) @binding(3) var<storage, read> norm_weight: array<vec4<f32>>;
{% endif %}

const lanes = {{ lanes }}u;
const quads = {{ quads }}u;

{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size(lanes)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let base = group.x * quads;
    var sum = vec4<f32>();
    for (var quad = lane; quad < quads; quad += {{ steps * lanes }}u) {
{% for s in range(steps) %}
        let at_{{ s }} = min(quad + {{ s * lanes }}u, quads - 1u);
        let x_{{ s }} = x[at_{{ s }}]{{ " * norm_weight[at_%d]" % s if norm }};
        let a_{{ s }} = factor[base + at_{{ s }}];
{% endfor %}
{% for s in range(steps) %}
        sum += select(vec4<f32>(), x_{{ s }} * a_{{ s }}, quad + {{ s * lanes }}u < quads);
{% endfor %}
    }
    let whole = row_sum(dot(sum, vec4(1.0)), lane);
{% if scales %}
    var scale = {{ scales[0] }};
{% for s in scales[1:] %}
    if (group.x >= {{ loop.index * rank }}u) { scale = {{ s }}; }
{% endfor %}
    if (lane == 0u) { z[group.x] = scale * whole; }
{% else %}
    if (lane == 0u) { z[group.x] = whole; }
{% endif %}
}
