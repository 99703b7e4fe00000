// x[m, i] ← x[m, i] · factors[{{ "positions[m]" if placed else "0" }}]   for i < {{ 4 * quads }}, in place.
//
// Bindings: x [rows, {{ stride }}] of {{ x_type }}, factors{% if placed %}, positions u32 [rows]{% endif %}. One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> factors: array<f32>;
{% if placed %}
@group(0) @binding(3) var<storage, read> positions: array<u32>;
{% endif %}

{% from "parts/stored.wgsl" import stored %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / {{ quads }}u;
    if (row >= extent.rows) { return; }
    let at = row * {{ stride // 4 }}u + index % {{ quads }}u;
    let factor = factors[{{ "positions[row]" if placed else "0" }}];
    x[at] = {{ stored("vec4<f32>(x[at]) * factor", x_type) }};
}
