// What a chunk of up to {{ chunk }} rows of an example has without its state, of the gated delta rule (Yang et al. 2024):
//   D[i, j] = exp(cum[i] − cum[j]),  j ≤ i;   A = strict lower part of beta[i] · D · k kᵀ;   T = (I + A)⁻¹
//   P = lower part of D · q kᵀ;   U = T · diag(beta) v;   W = T · diag(beta · exp(cum)) k
//
// Bindings: inputs [rows, …] (normed q and k, v, gates), {% if not text %}segments [rows, 2], {% endif %}mixes [rows, 2 · heads · {{ chunk }}] (T, P),
// deltas [rows, 4 · heads · {{ head_size }}] (o, v', U, W), of which U and W are written. One workgroup a block of rows and value head;
// it takes the chunks that begin there. Sums over columns and rows ascend; T by forward substitution, a row after
// the other.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> deltas: array<vec4<f32>>;
{% if not text %}
@group(0) @binding(4) var<storage, read> segments: array<vec2<u32>>;
{% endif %}

{% set triangular = true %}
{% import "parts/delta.wgsl" as delta with context %}
{% include "parts/delta.wgsl" %}
var<workgroup> square: array<f32, {{ chunk * chunk }}>; // A, whose rows become those of T

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let block = index / heads;
    let head = index % heads;
    if (block * chunk >= extent.rows) { return; }
{% call delta.each_chunk() %}
        load_gates(first, n, head, lane);
        let across = (n + 3u) / 4u;
        for (var tile = lane; tile < across * (across + 1u) / 2u; tile += lanes) {
            let place = lower_tile(tile) * 4u;
            let i0 = place.x;
            let j0 = place.y;
{% for r in range(4) %}
            var kk{{ r }} = vec4<f32>();
            var qk{{ r }} = vec4<f32>();
            let key{{ r }} = key_at(first + min(i0 + {{ r }}u, n - 1u), head);
            let query{{ r }} = query_at(first + min(i0 + {{ r }}u, n - 1u), head);
            let other{{ r }} = key_at(first + min(j0 + {{ r }}u, n - 1u), head);
{% endfor %}
            for (var x = 0u; x < quads; x += 1u) {
{% for s in range(4) %}
                let k{{ s }} = inputs[other{{ s }} + x];
{% endfor %}
{% for r in range(4) %}
                let own{{ r }} = inputs[key{{ r }} + x];
                kk{{ r }} += vec4(dot(own{{ r }}, k0), dot(own{{ r }}, k1), dot(own{{ r }}, k2), dot(own{{ r }}, k3));
                let q{{ r }} = inputs[query{{ r }} + x];
                qk{{ r }} += vec4(dot(q{{ r }}, k0), dot(q{{ r }}, k1), dot(q{{ r }}, k2), dot(q{{ r }}, k3));
{% endfor %}
            }
            let js = vec4(j0) + vec4(0u, 1u, 2u, 3u);
            let cums = vec4(cum[j0], cum[j0 + 1u], cum[j0 + 2u], cum[j0 + 3u]);
{% for r in range(4) %}
            if (i0 + {{ r }}u < n) {
                let i = i0 + {{ r }}u;
                let decay = exp(min(vec4(cum[i]) - cums, vec4<f32>()));
                let a = select(vec4<f32>(), beta[i] * decay * kk{{ r }}, js < vec4(i));
{% for s in range(4) %}
                square[i * chunk + j0 + {{ s }}u] = a[{{ s }}];
{% endfor %}
                let at = (first + i) * mix_stride + (heads + head) * (chunk / 4u) + j0 / 4u;
                mixes[at] = select(vec4<f32>(), decay * qk{{ r }}, js <= vec4(i));
            }
{% endfor %}
        }
        workgroupBarrier();
        for (var i = 0u; i < n; i += 1u) {
            var value = select(0.0, 1.0, lane == i);
            for (var j = lane; j < i; j += 1u) {
                value -= square[i * chunk + j] * square[j * chunk + lane];
            }
            workgroupBarrier();
            if (lane < chunk) { square[i * chunk + lane] = value; }
            workgroupBarrier();
        }
        for (var at = lane; at < n * (chunk / 4u); at += lanes) {
            let i = at / (chunk / 4u);
            let j = at % (chunk / 4u) * 4u;
            let from_at = i * chunk + j;
            mixes[(first + i) * mix_stride + head * (chunk / 4u) + j / 4u] =
                vec4(square[from_at], square[from_at + 1u], square[from_at + 2u], square[from_at + 3u]);
        }
        for (var tile = lane; tile < across * quads; tile += lanes) {
            let i0 = tile / quads * 4u;
            let x = tile % quads;
{% for r in range(4) %}
            var u{{ r }} = vec4<f32>();
            var w{{ r }} = vec4<f32>();
{% endfor %}
            for (var j = 0u; j < min(i0 + 4u, n); j += 1u) {
                let v = inputs[value_at(first + j, head) + x] * beta[j];
                let k = inputs[key_at(first + j, head) + x] * (beta[j] * rise[j]);
{% for r in range(4) %}
                let t{{ r }} = square[min(i0 + {{ r }}u, n - 1u) * chunk + j];
                u{{ r }} += t{{ r }} * v;
                w{{ r }} += t{{ r }} * k;
{% endfor %}
            }
{% for r in range(4) %}
            if (i0 + {{ r }}u < n) {
                let at = (first + i0 + {{ r }}u) * 4u * wide + head * quads + x;
                deltas[at + 2u * wide] = u{{ r }};
                deltas[at + 3u * wide] = w{{ r }};
            }
{% endfor %}
        }
{% endcall %}
}
