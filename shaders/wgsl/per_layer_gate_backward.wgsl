// gate[m, i] ← d_y[m, i] · activation'(gate[m, i]) · input[m, first + i]   for i < {{ 4 * quads }}, in place: d_gate.
//
// Bindings: gate [rows, {{ 4 * quads }}] of {{ x_type }}, input [rows, {{ 4 * stride }}] of {{ input_type }}, d_y shaped as gate of {{ d_y_type }}, place: first / 4.
// One lane four columns.
{% if gated_type %}
// gated, shaped as gate, of {{ gated_type }} is what per_layer_gate.wgsl gave, to its bits.
{% endif %}

struct Extent { rows: u32 }
struct Place { first: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read_write> gate: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> input: array<vec4<{{ input_type }}>>;
@group(0) @binding(3) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
@group(0) @binding(4) var<uniform> place: Place;
{% if gated_type %}
@group(0) @binding(5) var<storage, read_write> gated: array<vec4<{{ gated_type }}>>;
{% endif %}

{% from "parts/stored.wgsl" import stored %}
{% include "parts/activation.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / {{ quads }}u;
    if (row >= extent.rows) { return; }
    let factor = vec4<f32>(input[row * {{ stride }}u + place.first + index % {{ quads }}u]);
    let given = vec4<f32>(gate[index]);
    let slope = gate_slope(given) * factor;
    gate[index] = {{ stored("vec4<f32>(d_y[index]) * slope", x_type) }};
{% if gated_type %}
    gated[index] = {{ stored("gate_value(given) * factor", gated_type) }};
{% endif %}
}
