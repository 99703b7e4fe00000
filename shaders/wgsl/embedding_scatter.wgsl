// d_a[tokens[m]] += {{ scale }} · Σ d_z[n] over the rows n of the same token, for the first such m.
// Bindings: tokens u32 [rows], order u32 [rows] (all rows, by their tokens, those of a token ascending), d_z [rows, {{ width }}],
// d_a [vocab_size, {{ width }}]. One lane four columns of a place in the order; the lane of a token's first place sums all its rows,
// ascending.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> order: array<u32>;
@group(0) @binding(3) var<storage, read> d_z: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> d_a: array<vec4<f32>>;

const quads = {{ width // 4 }}u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = (group.x + group.y * groups.x) * 64u + lane;
    let place = at / quads;
    if (place >= extent.rows) { return; }
    let token = tokens[order[place]];
    if (place > 0u && tokens[order[place - 1u]] == token) { return; }
    let quad = at % quads;
    var sum = vec4<f32>();
    for (var n = place; n < extent.rows; n += 1u) {
        let row = order[n];
        if (tokens[row] != token) { break; }
        sum += d_z[row * quads + quad];
    }
    d_a[token * quads + quad] += {{ scale }} * sum;
}
