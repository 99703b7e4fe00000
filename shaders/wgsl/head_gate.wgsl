// y[m, h, i] = x[m, h, i] · σ(raw[m, 2 · {{ size }} · h + {{ size }} + i])   for heads h and their {{ size }} columns i
//
// Bindings: raw [rows, {{ stride }}] of {{ raw_type }}, x and y [rows, {{ width }}] of {{ x_type }} and {{ y_type }}. One lane a row and four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> raw: array<vec4<{{ raw_type }}>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<{{ y_type }}>>;

{% from "parts/stored.wgsl" import stored %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / {{ width // 4 }}u;
    if (row >= extent.rows) { return; }
    let column = index % {{ width // 4 }}u;
    let gate_at = row * {{ stride // 4 }}u + column + (column / {{ size // 4 }}u + 1u) * {{ size // 4 }}u;
    let value = vec4<f32>(x[index]) / (vec4(1.0) + exp(-vec4<f32>(raw[gate_at])));
    y[index] = {{ stored("value", y_type) }};
}
