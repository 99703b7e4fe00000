// y[m, {{ 4 * y_first }} + i] {{ "+=" if accumulate else "=" }} x[m, {{ 4 * x_first }} + i]   for i < {{ 4 * quads }}.
//
// Bindings: x [rows, {{ 4 * x_stride }}] of {{ x_type }}, y [rows, {{ 4 * y_stride }}] of {{ y_type }}. One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read_write> y: array<vec4<{{ y_type }}>>;

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
    let column = index % {{ quads }}u;
    let value = vec4<f32>(x[row * {{ x_stride }}u + {{ x_first }}u + column]);
    let at = row * {{ y_stride }}u + {{ y_first }}u + column;
    y[at] = {{ stored("vec4<f32>(y[at]) + value" if accumulate else "value", y_type) }};
}
