// The gated delta rule for one new row of a text, S [{{ head_size }}, {{ head_size }}] a value head, zero where the text begins:
//   d = beta · (v − exp(g) · Sᵀ k);   S ← exp(g) · S + k dᵀ;   o = Sᵀ q
//
// Bindings: inputs as in delta_prepare.wgsl, positions [1], state [heads, {{ head_size }}, {{ head_size }}], deltas [1, 4 · heads · {{ head_size }}], of which o is
// written. One workgroup a value head and 32 columns of its S. A lane sums every 16th row, ascending, for four columns;
// the lanes' sums meet in order.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> state: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> deltas: array<vec4<f32>>;

const heads = {{ value_heads }}u;
const key_heads = {{ key_heads }}u;
const quads = {{ head_size // 4 }}u;
const blocks = (quads + 7u) / 8u;
var<workgroup> sums: array<vec4<f32>, 128>;

// The sum of what all lanes of the same columns have.
fn joined(own: vec4<f32>, lane: u32) -> vec4<f32> {
    workgroupBarrier();
    sums[lane] = own;
    workgroupBarrier();
    var whole = vec4<f32>();
    for (var part = 0u; part < 16u; part += 1u) {
        whole += sums[part * 8u + lane % 8u];
    }
    return whole;
}

@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = group.x / blocks;
    let b = group.x % blocks * 8u + lane % 8u;
    let inside = b < quads && head < heads && extent.rows > 0u;
    let gates = (2u * key_heads + heads) * quads + head / 4u;
    let beta = inputs[gates + heads / 4u][head % 4u];
    let goes_on = positions[0] > 0u;
    let decay = exp(inputs[gates][head % 4u]);
    let query = head % key_heads * quads;
    let key = query + key_heads * quads;
    let own = head * 4u * quads * quads + b;
    var kept = vec4<f32>();
    if (inside && goes_on) {
        for (var a = lane / 8u; a < 4u * quads; a += 16u) {
            kept += inputs[key + a / 4u][a % 4u] * state[own + a * quads];
        }
    }
    kept = joined(kept, lane);
    var o = vec4<f32>();
    if (inside) {
        let d = beta * (inputs[(2u * key_heads + head) * quads + b] - decay * kept);
        for (var a = lane / 8u; a < 4u * quads; a += 16u) {
            var s = inputs[key + a / 4u][a % 4u] * d;
            if (goes_on) { s += decay * state[own + a * quads]; }
            state[own + a * quads] = s;
            o += inputs[query + a / 4u][a % 4u] * s;
        }
    }
    o = joined(o, lane);
    if (inside && lane < 8u) { deltas[head * quads + b] = o; }
}
