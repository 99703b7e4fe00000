// The gated delta rule over an example's chunks, in order, S [{{ head_size }}, {{ head_size }}] a value head, zero at the example's start:
//   v' = U − W S;   o = diag(exp(cum)) q S + P v';   S ← exp(cum[last]) S + (diag(exp(cum[last] − cum)) k)ᵀ v'
{% if text %}
// The rows are new ones of a text: S is taken from state where they do not begin it, and left there.
{% endif %}
//
// Bindings: inputs, mixes (P), deltas (U, W; o and v' are written) as in delta_prepare.wgsl, states [chunks, heads,
// {{ head_size }}, {{ head_size }}]: S at the start of every chunk but an example's first, by the chunk's first row over {{ chunk }},
{% if text %}
// positions [rows], state [heads, {{ head_size }}, {{ head_size }}].
{% else %}
// segments [rows, 2].
{% endif %}
// One workgroup a block of rows (for the examples that begin there), value head and {{ columns }} columns of v. Sums ascend.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> states: array<vec4<f32>>;
{% if text %}
@group(0) @binding(5) var<storage, read> positions: array<u32>;
@group(0) @binding(6) var<storage, read_write> state: array<vec4<f32>>;
{% else %}
@group(0) @binding(5) var<storage, read> segments: array<vec2<u32>>;
{% endif %}

{% import "parts/delta.wgsl" as delta with context %}
{% include "parts/delta.wgsl" %}
const across = {{ columns // 4 }}u; // quads of columns
const parts = {{ head_size // columns }}u;
var<workgroup> held: array<vec4<f32>, {{ head_size * columns // 4 }}>; // S
var<workgroup> news: array<vec4<f32>, {{ chunk * columns // 4 }}>; // v'

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
        let bounds = {{ delta.bounds_of("row") }};
        let end = min(bounds.y, extent.rows);
        if (bounds.x != row) {
            row = end;
            continue;
        }
{% if text %}
        let goes_on = positions[0] > 0u;
{% endif %}
        for (var at = lane; at < 4u * quads * across; at += lanes) {
            held[at] = vec4<f32>();
{% if text %}
            if (goes_on) {
                let of_head = (head * 4u * quads + at / across) * quads;
                held[at] = state[of_head + column + at % across];
            }
{% endif %}
        }
        for (var first = row; first < end; first += chunk) {
            let n = min(chunk, end - first);
            load_gates(first, n, head, lane);
            if (first > row) {
                let of_head = (first / chunk * heads + head) * 4u * quads;
                for (var at = lane; at < 4u * quads * across; at += lanes) {
                    states[(of_head + at / across) * quads + column + at % across] = held[at];
                }
            }
            for (var tile = lane; tile < chunk / 2u * across; tile += lanes) {
                let i0 = tile / across * 2u;
                let b = tile % across;
{% for r in range(2) %}
                let at{{ r }} = (first + min(i0 + {{ r }}u, n - 1u)) * 4u * wide + head * quads;
                var v{{ r }} = deltas[at{{ r }} + 2u * wide + column + b];
{% endfor %}
                for (var x = 0u; x < quads; x += 1u) {
{% for r in range(2) %}
                    let w{{ r }} = deltas[at{{ r }} + 3u * wide + x];
{% endfor %}
{% for s in range(4) %}
                    let s{{ s }} = held[(4u * x + {{ s }}u) * across + b];
{% endfor %}
{% for r in range(2) %}
                    v{{ r }} -= w{{ r }}.x * s0 + w{{ r }}.y * s1 + w{{ r }}.z * s2 + w{{ r }}.w * s3;
{% endfor %}
                }
{% for r in range(2) %}
                let own{{ r }} = i0 + {{ r }}u < n;
                news[(i0 + {{ r }}u) * across + b] = select(vec4<f32>(), v{{ r }}, own{{ r }});
                if (own{{ r }}) { deltas[at{{ r }} + wide + column + b] = v{{ r }}; }
{% endfor %}
            }
            workgroupBarrier();
            for (var tile = lane; tile < (n + 1u) / 2u * across; tile += lanes) {
                let i0 = tile / across * 2u;
                let b = tile % across;
{% for r in range(2) %}
                let row{{ r }} = first + min(i0 + {{ r }}u, n - 1u);
                let query{{ r }} = query_at(row{{ r }}, head);
                let mix{{ r }} = row{{ r }} * mix_stride + (heads + head) * (chunk / 4u);
                var o{{ r }} = vec4<f32>();
{% endfor %}
                for (var x = 0u; x < quads; x += 1u) {
{% for s in range(4) %}
                    let s{{ s }} = held[(4u * x + {{ s }}u) * across + b];
{% endfor %}
{% for r in range(2) %}
                    let q{{ r }} = inputs[query{{ r }} + x];
                    o{{ r }} += q{{ r }}.x * s0 + q{{ r }}.y * s1 + q{{ r }}.z * s2 + q{{ r }}.w * s3;
{% endfor %}
                }
{% for r in range(2) %}
                o{{ r }} *= rise[min(i0 + {{ r }}u, n - 1u)];
{% endfor %}
                for (var j = 0u; j <= i0 / 4u; j += 1u) {
{% for s in range(4) %}
                    let v{{ s }} = news[(4u * j + {{ s }}u) * across + b];
{% endfor %}
{% for r in range(2) %}
                    let p{{ r }} = mixes[mix{{ r }} + j];
                    o{{ r }} += p{{ r }}.x * v0 + p{{ r }}.y * v1 + p{{ r }}.z * v2 + p{{ r }}.w * v3;
{% endfor %}
                }
{% for r in range(2) %}
                if (i0 + {{ r }}u < n) { deltas[row{{ r }} * 4u * wide + head * quads + column + b] = o{{ r }}; }
{% endfor %}
            }
            workgroupBarrier();
            for (var tile = lane; tile < quads * across; tile += lanes) {
                let a = tile / across;
                let b = tile % across;
{% for r in range(4) %}
                var s{{ r }} = rise[n - 1u] * held[(4u * a + {{ r }}u) * across + b];
{% endfor %}
                for (var i = 0u; i < n; i += 1u) {
                    let k = inputs[key_at(first + i, head) + a] * fall[i];
                    let v = news[i * across + b];
{% for r in range(4) %}
                    s{{ r }} += k[{{ r }}] * v;
{% endfor %}
                }
{% for r in range(4) %}
                held[(4u * a + {{ r }}u) * across + b] = s{{ r }};
{% endfor %}
            }
        }
{% if text %}
        workgroupBarrier();
        for (var at = lane; at < 4u * quads * across; at += lanes) {
            let of_head = (head * 4u * quads + at / across) * quads;
            state[of_head + column + at % across] = held[at];
        }
{% endif %}
        workgroupBarrier();
        row = end;
    }
}
