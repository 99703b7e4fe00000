// d_a[tokens[m]] += {{ scale }} · Σ d_z[n] over the rows n of the same token, for the first such m.
// Bindings: tokens u32 [rows], d_z [rows, {{ width }}], d_a [vocab_size, {{ width }}]. One lane four columns of a row; the
// lane of a token's first row sums all of them, in order.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> d_z: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> d_a: array<vec4<f32>>;

const quads = {{ width // 4 }}u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = (group.x + group.y * groups.x) * 64u + lane;
    let row = at / quads;
    if (row >= extent.rows) { return; }
    let token = tokens[row];
    for (var n = 0u; n < row; n += 1u) {
        if (tokens[n] == token) { return; }
    }
    let quad = at % quads;
    var sum = vec4<f32>();
    for (var n = row; n < extent.rows; n += 1u) {
        if (tokens[n] == token) { sum += d_z[n * quads + quad]; }
    }
    d_a[token * quads + quad] += {{ scale }} * sum;
}
