// Two steps of the backward in one dispatch on matrix units: the gradients of one group's factors, as in
// lora_gradient_matrix.wgsl, and d_z of the group that comes next, as in lora_project_matrix.wgsl, each to the same bits:
// d_A[i, j] += Σ_m d_z[m, i] · x[m, j],   d_B[i, j] += scale · Σ_m d_y[m, column_g + i] · z[m, g · rank + j]   and
// next_d_z[m, g · columns + j] = scale_g · Σ_k next_d_y[m, x_column_g + k] · factor[factor_row_g + k, j],   k < length_g
//
// Bindings: as of lora_gradient_matrix.wgsl; then next_d_y [rows, {{ projection.x_stride }}] of {{ projection.x_type }}, factor (the next
// group's B) [.., {{ projection.factor_stride }}] and next_d_z [rows, members · columns]. Nothing that one step writes is read by the
// other. The first {{ gradient_groups }} workgroups of each z make the gradients of slice z; the others, of all {{ n_slices }} slices, are
// those of the projection.
{% from "parts/fragments.wgsl" import pack_eight with context %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ "u32" if parts[0].eights else parts[0].long_type }}>>;
@group(0) @binding(2) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_y: array<vec4<{{ "u32" if parts[1].eights else parts[1].long_type }}>>;
@group(0) @binding(4) var<storage, read> d_z: array<vec4<f32>>;
{% for s in range(n_slices) %}
@group(0) @binding({{ 5 + s }}) var<storage, read_write> gradient_{{ s }}: array<vec4<f32>>;
{% endfor %}
{% set keys = 5 + n_slices %}
{% if dropout %}
@group(0) @binding({{ keys }}) var<storage, read> row_keys: array<u32>;
@group(0) @binding({{ keys + 1 }}) var<uniform> matrix_keys: vec4<u32>;

{% include "parts/dropout.wgsl" %}
{% endif %}
{% set after = keys + (2 if dropout else 0) %}
{% if d_y_copied %}
@group(0) @binding({{ after }}) var<storage, read> d_y_largest: array<u32>;
{% set after = after + 1 %}
{% endif %}
{% if p_type %}
@group(0) @binding({{ after }}) var<storage, read> p: array<vec4<{{ "u32" if parts[1].eights else p_type }}>>;
@group(0) @binding({{ after + 1 }}) var<storage, read> scales: array<f32>;
@group(0) @binding({{ after + 2 }}) var<storage, read> inverses: array<vec4<f32>>;
{% set after = after + 3 %}
{% endif %}
@group(0) @binding({{ after }}) var<storage, read> next_d_y: array<vec4<{{ "u32" if projection.x_by_eights else projection.x_type }}>>;
@group(0) @binding({{ after + 1 }}) var<storage, read> factor: array<vec4<f32>>;
@group(0) @binding({{ after + 2 }}) var<storage, read_write> next_d_z: array<vec4<f32>>;
{% if projection.x_scaled %}
@group(0) @binding({{ after + 3 }}) var<storage, read> row_largest: array<u32>; // of next_d_y, as in lora_project_matrix.wgsl
{% endif %}
{% if projection.factor_scaled %}
@group(0) @binding({{ after + 3 + projection.x_scaled }}) var<storage, read> factor_scales: array<f32>; // of the columns of next_d_y
{% endif %}

const lanes = {{ lanes }}u;
var<workgroup> tiles: array<vec4<u32>, {{ tiles }}>; // of whichever step the workgroup is

{{ pack_eight() }}
{% include "parts/lora_gradient_matrix.wgsl" %}

{% with x_name = "next_d_y", z_name = "next_d_z", depth = projection.depth, dropout = none %}
{% include "parts/lora_project_matrix.wgsl" %}
{% endwith %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
{% if not emulated %}
    @builtin(subgroup_id) team: u32,
{% endif %}
) {
{% if emulated %}
    let team = lane / {{ subgroup_lanes }}u;
{% endif %}
    if (group.x < {{ gradient_groups }}u) {
        add_gradients(group.x, group.z, lane, team);
    } else {
        project(group.x - {{ gradient_groups }}u + group.z * (groups.x - {{ gradient_groups }}u), lane, team);
    }
}
