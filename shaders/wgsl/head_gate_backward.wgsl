// Gradient of head_gate.wgsl, in place: d becomes d · s, and the gate's is d · x · s · (1 − s), s = σ(gate).
//
// Bindings: raw [rows, {{ stride }}] of {{ raw_type }}, x [rows, {{ width }}] of {{ x_type }}, d [rows, {{ width }}] of {{ d_type }}, d_raw
// [rows, {{ stride }}] of {{ d_raw_type }}, of which the gates' columns are written. One lane a row and four columns.
{% if gated_type %}
// gated [rows, {{ width }}] of {{ gated_type }} is what head_gate.wgsl gave, to its bits.
{% endif %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> raw: array<vec4<{{ raw_type }}>>;
@group(0) @binding(2) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(3) var<storage, read_write> d: array<vec4<{{ d_type }}>>;
@group(0) @binding(4) var<storage, read_write> d_raw: array<vec4<{{ d_raw_type }}>>;
{% if gated_type %}
@group(0) @binding(5) var<storage, read_write> gated: array<vec4<{{ gated_type }}>>;
{% endif %}

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
    let s = vec4(1.0) / (vec4(1.0) + exp(-vec4<f32>(raw[gate_at])));
    let gradient = vec4<f32>(d[index]) * s;
    let d_gate = gradient * vec4<f32>(x[index]) * (vec4(1.0) - s);
    d[index] = {{ stored("gradient", d_type) }};
    d_raw[gate_at] = {{ stored("d_gate", d_raw_type) }};
{% if gated_type %}
    let value = vec4<f32>(x[index]) / (vec4(1.0) + exp(-vec4<f32>(raw[gate_at])));
    gated[index] = {{ stored("value", gated_type) }};
{% endif %}
}
