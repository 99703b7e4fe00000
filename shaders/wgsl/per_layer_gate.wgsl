// y[m, i] = activation(gate[m, i]) · input[m, first + i]   for i < {{ 4 * quads }}.
//
// Bindings: gate [rows, {{ 4 * quads }}] of {{ x_type }}, input [rows, {{ 4 * stride }}] of {{ input_type }}, y shaped as gate of {{ y_type }}, place: first / 4.
// One lane four columns.

struct Extent { rows: u32 }
struct Place { first: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> gate: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> input: array<vec4<{{ input_type }}>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<{{ y_type }}>>;
@group(0) @binding(4) var<uniform> place: Place;

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
    y[index] = {{ stored("gate_value(vec4<f32>(gate[index])) * factor", y_type) }};
}
