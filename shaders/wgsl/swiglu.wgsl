// y[m, i] = activation(gate[m, i]) · up[m, i];  gate_up [rows, 2n] holds the gate first; y [rows, n].
// One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> gate_up: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<f32>>;

const quads = {{ width // 4 }}u; // of y, a row

{% include "activation.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / quads;
    if (row >= extent.rows) { return; }
    let at = row * 2u * quads + index % quads;
    y[index] = gate_value(gate_up[at]) * gate_up[at + quads];
}
