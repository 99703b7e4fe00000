// y[m] = rows[slots[tokens[m]]] · scale where the token has a slot; other rows of y stay.
// Bindings: tokens u32 [y's rows], slots u32 [vocab_size] (0xffffffff: none), rows [n, {{ width }}],
// y [any, {{ width }}]. One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> slots: array<u32>;
@group(0) @binding(3) var<storage, read> rows: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;

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
    let slot = slots[tokens[row]];
    if (slot == 0xffffffffu) { return; }
    y[at] = rows[slot * quads + at % quads] * {{ scale }};
}
