// The projection as in lora_project.wgsl, on matrix units:
// z[m, g · columns + j] = scale_g · Σ_k x[m, x_column_g + k] · F_g[j, k],   k < length_g
{% if transposed %}
// F_g[j, k] = factor[factor_row_g + k, j]
{% else %}
// F_g[j, k] = factor[factor_row_g + j, k]
{% endif %}
//
// Bindings: x [rows, {{ x_stride }}] of {{ x_type }}, factor [.., {{ factor_stride }}], z [rows, members · columns], f32.
// A workgroup computes {{ block_rows }} rows × all columns of a member. {{ depth }} steps of the contraction at a time lie in
// workgroup memory, as f16; of every {{ subgroups }} fragments along them a subgroup takes one, and the subgroups'
// sums, f32, meet at the end, in order. The factor is scaled by {{ factor_scale }} in f16: B's numbers may be below its
// smallest. A row's sums do not depend on the block that it is in.
{% if x_scaled %}
// Rows of x are scaled by the power of two that brings their largest number, of the bits in row_largest [rows], to
// 2^4 … 2^5, as the products do that read it (matmul_bindings.wgsl); of f16 they are so already.
{% endif %}
{% if factor_scaled %}
// F_g[j, k] counts factor_scales[x_column_g + k] times, of the columns of x.
{% endif %}
{% if dropout %}
// Of x counts what dropout leaves, member by member (parts/dropout.wgsl): row_keys u32 [rows], matrix_keys. A member is {{ pieces }}
// here, of some of its columns each.
{% endif %}
{% from "parts/fragments.wgsl" import pack_eight with context %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ "u32" if x_by_eights else x_type }}>>;
@group(0) @binding(2) var<storage, read> factor: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> z: array<vec4<f32>>;
{% set next = 4 %}
{% if x_scaled %}
@group(0) @binding({{ next }}) var<storage, read> row_largest: array<u32>;
{% set next = next + 1 %}
{% endif %}
{% if factor_scaled %}
@group(0) @binding({{ next }}) var<storage, read> factor_scales: array<f32>;
{% set next = next + 1 %}
{% endif %}
{% if dropout %}
@group(0) @binding({{ next }}) var<storage, read> row_keys: array<u32>;
@group(0) @binding({{ next + 1 }}) var<uniform> matrix_keys: vec4<u32>;

{% include "parts/dropout.wgsl" %}
{% endif %}

const lanes = {{ subgroups * subgroup_lanes }}u;
// x [block_rows][depth / 8 + 1], then the factor [{{ "depth" if transposed else "columns" }}][{{ "columns" if transposed else "depth" }} / 8 + 1], eight f16 an element; at the end
// sums [subgroups][block_rows][columns / 4], four f32 an element; columns in whole fragments.
var<workgroup> tiles: array<vec4<u32>, {{ tiles }}>;

{{ pack_eight() }}
{% with x_name = "x", z_name = "z" %}
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
    project(group.x + group.y * groups.x, lane, team);
}
