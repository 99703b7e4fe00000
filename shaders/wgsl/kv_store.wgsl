// keys[c, positions[m]] = k[m, c],   values[positions[m], c] = v[m, c]   for four columns c at a time.
//
// Bindings: qkv [rows, stride] (heads of q, of k, of v; q and k rotated), positions u32 [rows],
// keys [kv_size / 4, room] of vec4 (lanes that each take one key then read side by side),
// values [room, kv_size / 4] of vec4. One lane four columns of k and of v.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> keys: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> values: array<vec4<f32>>;

const quads = {{ kv_size // 4 }}u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / quads;
    if (row >= extent.rows) { return; }
    let quad = index % quads;
    let position = positions[row];
    let at = row * {{ stride // 4 }}u + {{ query_size // 4 }}u + quad;
    keys[quad * {{ room }}u + position] = qkv[at];
    values[position * quads + quad] = qkv[at + quads];
}
