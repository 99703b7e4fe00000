// d_b = d_beta · s · (1 − s) with s = σ(b),   d_alpha = d_g · a · σ(alpha + dt)   (a and dt are frozen)
//
// Bindings: projected, a, dt as in delta_gates.wgsl, d_gates [rows, {{ 2 * heads }}] with d_g first, d_projected
// [rows, {{ stride }}] of {{ d_type }}, of which the columns of b and alpha are written. One lane a row and four heads.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> projected: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dt: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> d_gates: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> d_projected: array<vec4<{{ d_type }}>>;

{% from "parts/stored.wgsl" import stored %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / {{ heads // 4 }}u;
    if (row >= extent.rows) { return; }
    let head = index % {{ heads // 4 }}u;
    let at = row * {{ stride // 4 }}u + {{ first // 4 }}u + head;
    let s = vec4(1.0) / (vec4(1.0) + exp(-vec4<f32>(projected[at])));
    let x = vec4<f32>(projected[at + {{ heads // 4 }}u]) + dt[head];
    let gradients = row * {{ heads // 2 }}u + head;
    let d_b = d_gates[gradients + {{ heads // 4 }}u] * s * (vec4(1.0) - s);
    let d_alpha = d_gates[gradients] * a[head] / (vec4(1.0) + exp(-x));
    d_projected[at] = {{ stored("d_b", d_type) }};
    d_projected[at + {{ heads // 4 }}u] = {{ stored("d_alpha", d_type) }};
}
