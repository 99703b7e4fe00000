{% from "parts/stored.wgsl" import stored %}
// y[m, j] = scales[j] · x[m, j]{{ " + bias[j]" if bias }}{{ " + residual[m, j]" if residual }}
//
// Bindings: x [rows, {{ width }}] of {{ x_type }}, scales [{{ width }}], y [rows, {{ width }}] of {{ y_type }}{{ ", bias [%d]" % width if bias }}{{ ", residual f32 [rows, %d]" % width if residual }}.
// One lane four columns.

{% set quads = width // 4 %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> scales: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<{{ y_type }}>>;
{% if bias %}
@group(0) @binding(4) var<storage, read> bias: array<vec4<f32>>;
{% endif %}
{% if residual %}
@group(0) @binding({{ 5 if bias else 4 }}) var<storage, read> residual: array<vec4<f32>>;
{% endif %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    if (index / {{ quads }}u >= extent.rows) { return; }
    let quad = index % {{ quads }}u;
    let value = scales[quad] * vec4<f32>(x[index]){{ " + bias[quad]" if bias }}{{ " + residual[index]" if residual }};
    y[index] = {{ stored("value", y_type) }};
}
