// The gated delta rule for one new row of a text, S [{{ head_size }}, {{ head_size }}] a value head, zero where the text begins:
//   d = beta · (v − exp(g) · Sᵀ k);   S ← exp(g) · S + k dᵀ;   o = Sᵀ q
//
// Bindings: inputs as in delta_prepare.wgsl, positions [1], state [heads, {{ head_size }}, {{ head_size }}], deltas [1, 4 · heads · {{ head_size }}], of which o is
// written. One lane four columns of a value head's S; its rows ascend.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> state: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> deltas: array<vec4<f32>>;

const heads = {{ value_heads }}u;
const key_heads = {{ key_heads }}u;
const quads = {{ head_size // 4 }}u;

@compute @workgroup_size(32)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    if (id.x >= heads * quads || extent.rows == 0u) { return; }
    let head = id.x / quads;
    let b = id.x % quads;
    let at = 2u * key_heads * quads + heads * quads + head / 4u;
    let beta = inputs[at + heads / 4u][head % 4u];
    var decay = 0.0; // of nothing
    if (positions[0] > 0u) { decay = exp(inputs[at][head % 4u]); }
    let query = head % key_heads * quads;
    let key = query + key_heads * quads;
    let own = head * 4u * quads * quads + b;
    var kept = vec4<f32>();
    if (positions[0] > 0u) {
        for (var a = 0u; a < quads; a += 1u) {
            let k = inputs[key + a];
{% for r in range(4) %}
            kept += k[{{ r }}] * state[own + (4u * a + {{ r }}u) * quads];
{% endfor %}
        }
    }
    let d = beta * (inputs[(2u * key_heads + head) * quads + b] - decay * kept);
    var o = vec4<f32>();
    for (var a = 0u; a < quads; a += 1u) {
        let k = inputs[key + a];
        let q = inputs[query + a];
{% for r in range(4) %}
        var s{{ r }} = k[{{ r }}] * d;
        if (decay > 0.0) { s{{ r }} += decay * state[own + (4u * a + {{ r }}u) * quads]; }
        state[own + (4u * a + {{ r }}u) * quads] = s{{ r }};
        o += q[{{ r }}] * s{{ r }};
{% endfor %}
    }
    deltas[id.x] = o;
}
