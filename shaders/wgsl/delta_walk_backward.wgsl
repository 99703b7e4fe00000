// Gradient of delta_walk.wgsl along an example's chunks, the last first; G is the gradient to the state that a chunk
// leaves, zero after the last:
//   d_v' = Pᵀ d_o + diag(exp(cum[last] − cum)) k G
//   G ← exp(cum[last]) G + (diag(exp(cum)) q)ᵀ d_o − Wᵀ d_v'
//
// Bindings: inputs, mixes (P), deltas (W), segments as in delta_walk.wgsl, d_deltas [rows, 7 · heads · {{ head_size }}] (d_o; d_v' is
// written after it), d_states like states: the gradient to S at the start of every chunk but an example's first.
// One workgroup a block of rows (for the examples that begin there), value head and {{ columns }} columns of v. Sums ascend.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> d_deltas: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> d_states: array<vec4<f32>>;

{% import "parts/delta.wgsl" as delta with context %}
{% include "parts/delta.wgsl" %}
const across = {{ columns // 4 }}u; // quads of columns
const parts = {{ head_size // columns }}u;
var<workgroup> held: array<vec4<f32>, {{ head_size * columns // 4 }}>; // G
var<workgroup> news: array<vec4<f32>, {{ chunk * columns // 4 }}>; // d_v'

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let column = index % parts * across;
    let head = index / parts % heads;
    let block = index / parts / heads;
    if (block * chunk >= extent.rows) { return; }
    let block_end = min((block + 1u) * chunk, extent.rows);
    var row = block * chunk;
    while (row < block_end) {
        let bounds = segments[row];
        let end = min(bounds.y, extent.rows);
        if (bounds.x != row) {
            row = end;
            continue;
        }
        for (var at = lane; at < 4u * quads * across; at += lanes) {
            held[at] = vec4<f32>();
        }
        let count = (end - row + chunk - 1u) / chunk;
        for (var left = count; left > 0u; left -= 1u) {
            let first = row + (left - 1u) * chunk;
            let n = min(chunk, end - first);
            load_gates(first, n, head, lane);
            for (var tile = lane; tile < (n + 1u) / 2u * across; tile += lanes) {
                let i0 = tile / across * 2u;
                let b = tile % across;
{% for r in range(2) %}
                let row{{ r }} = first + min(i0 + {{ r }}u, n - 1u);
                let key{{ r }} = key_at(row{{ r }}, head);
                var d{{ r }} = vec4<f32>();
{% endfor %}
                for (var x = 0u; x < quads; x += 1u) {
{% for s in range(4) %}
                    let g{{ s }} = held[(4u * x + {{ s }}u) * across + b];
{% endfor %}
{% for r in range(2) %}
                    let k{{ r }} = inputs[key{{ r }} + x];
                    d{{ r }} += k{{ r }}.x * g0 + k{{ r }}.y * g1 + k{{ r }}.z * g2 + k{{ r }}.w * g3;
{% endfor %}
                }
{% for r in range(2) %}
                d{{ r }} *= fall[min(i0 + {{ r }}u, n - 1u)];
{% endfor %}
                for (var t = i0; t < n; t += 1u) {
                    let quad = mixes[(first + t) * mix_stride + (heads + head) * (chunk / 4u) + i0 / 4u];
                    let p = select(quad.xy, quad.zw, i0 % 4u == 2u);
                    let d_o = d_deltas[(first + t) * 7u * wide + head * quads + column + b];
{% for r in range(2) %}
                    d{{ r }} += p[{{ r }}] * d_o;
{% endfor %}
                }
{% for r in range(2) %}
                if (i0 + {{ r }}u < n) {
                    news[(i0 + {{ r }}u) * across + b] = d{{ r }};
                    d_deltas[row{{ r }} * 7u * wide + wide + head * quads + column + b] = d{{ r }};
                }
{% endfor %}
            }
            workgroupBarrier();
            if (left > 1u) { // nothing comes before the first
                for (var tile = lane; tile < quads * across; tile += lanes) {
                    let a = tile / across;
                    let b = tile % across;
{% for r in range(4) %}
                    var g{{ r }} = rise[n - 1u] * held[(4u * a + {{ r }}u) * across + b];
{% endfor %}
                    for (var i = 0u; i < n; i += 1u) {
                        let q = inputs[query_at(first + i, head) + a] * rise[i];
                        let w = deltas[(first + i) * 4u * wide + 3u * wide + head * quads + a];
                        let d_o = d_deltas[(first + i) * 7u * wide + head * quads + column + b];
                        let d_v = news[i * across + b];
{% for r in range(4) %}
                        g{{ r }} += q[{{ r }}] * d_o - w[{{ r }}] * d_v;
{% endfor %}
                    }
                    let of_head = (first / chunk * heads + head) * 4u * quads + 4u * a;
{% for r in range(4) %}
                    held[(4u * a + {{ r }}u) * across + b] = g{{ r }};
                    d_states[(of_head + {{ r }}u) * quads + column + b] = g{{ r }};
{% endfor %}
                }
            }
        }
        workgroupBarrier();
        row = end;
    }
}
