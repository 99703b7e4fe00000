{% set quads = lane_columns // 4 %}
{% set lane_sums = lane_rows * quads %}
{% set lanes = splits * column_lanes * row_lanes %}
{% set parts = [splits // 8, 1] | max %}
{% set block_rows = lane_rows * row_lanes %}
{% set block_columns = lane_columns * column_lanes %}
{% set n_sums = lane_sums * column_lanes * row_lanes %}
// z[m, g · columns + j] = scale_g · Σ_k x[m, x_column_g + k] · F_g[j, k],   k < length_g
{% if transposed %}
// F_g[j, k] = factor[factor_row_g + k, j]
{% else %}
// F_g[j, k] = factor[factor_row_g + j, k]
{% endif %}
//
// Bindings: x [rows, {{ x_stride }}] of {{ x_type }}, factor [.., {{ factor_stride }}], z [rows, members · columns].
{% if dropout %}
// Of x counts what dropout leaves, member by member (parts/dropout.wgsl): row_keys u32 [rows], matrix_keys.
{% endif %}
// Few outputs and a long sum: a workgroup owns {{ block_rows }} rows × {{ block_columns }} columns of one member, a lane {{ lane_rows }} × {{ lane_columns }}
// of them, and {{ splits }} lanes share the contraction of the same ones. Neighbouring lanes differ in their columns
// ({{ column_lanes }}), then in the contraction, then in their rows ({{ row_lanes }}): they read the same of x, and side by side of the
// factor. A lane sums k = 4 · split, 4 · (split + {{ splits }}), … (four at a time) in named accumulators; the splits'
// sums meet in workgroup memory{% if parts > 1 %}: those of 8 splits, {{ parts }} apart, then these {{ parts }} parts{% endif %}. A row's sums do not depend
// on the block that it is in.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> factor: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> z: array<vec4<f32>>;
{% if dropout %}
@group(0) @binding(4) var<storage, read> row_keys: array<u32>;
@group(0) @binding(5) var<uniform> matrix_keys: vec4<u32>;

{% include "parts/dropout.wgsl" %}
{% endif %}

const lanes = {{ lanes }}u;

var<workgroup> sums: array<vec4<f32>, {{ lanes * lane_sums }}>; // [sums of a lane, lanes]

{% with x_name = "x", z_name = "z" %}
{% include "parts/lora_project.wgsl" %}
{% endwith %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    project(group.x + group.y * groups.x, lane);
}
