// d_gate = d_y · up · activation'(gate),  d_up = d_y · activation(gate); layouts as in swiglu.wgsl.
// In place (d_gate_up is gate_up) both are read before they are overwritten. One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> d_y: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> d_gate_up: array<vec4<f32>>;
{% if not in_place %}
@group(0) @binding(3) var<storage, read> gate_up: array<vec4<f32>>;
{% endif %}
{% set source = "d_gate_up" if in_place else "gate_up" %}

const quads = {{ width // 4 }}u; // of d_y, a row

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
    let gate = {{ source }}[at];
    let up = {{ source }}[at + quads];
    let d = d_y[index];
    d_gate_up[at] = d * up * gate_slope(gate);
    d_gate_up[at + quads] = d * gate_value(gate);
}
