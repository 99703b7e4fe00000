// d_A[i, j] += Σ_m d_z[m, i] · x[m, j]   and, for each member g and its rows i of B,
// d_B[i, j] += scale · Σ_m d_y[m, column_g + i] · z[m, g · rank + j]
//
// Bindings: x [rows, {{ parts[0].right_stride }}] of {{ x_type }}, z [rows, {{ parts[1].right_stride }}], d_y [rows, {{ parts[1].left_stride }}] of {{ d_y_type }}, d_z [rows, {{ parts[0].left_stride }}]; gradient_s, one of each
// slice s: d_A and, from vec4 {{ parts[1].start }} on, d_B. The rows in use are cut into {{ n_slices }} equal stretches;
// workgroups with z = s sum stretch s and add it to slice s, so that no two lanes write one element
// and no second pass is needed (the optimizer adds the slices up). The first {{ parts[0].n_groups }} workgroups make
// d_A, the others d_B.
//
// A lane holds a block of elements in named accumulators and sums rows split, split + {{ splits }}, … of its
// stretch in order{% if splits > 1 %}; the {{ splits }} splits of a block meet in workgroup memory, in order{% endif %}. Neighbouring lanes differ along the
// gradient's shorter side, where they read the same of the longer one, then along the longer side.

{% set lanes = blocks * splits %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
@group(0) @binding(4) var<storage, read> d_z: array<vec4<f32>>;
{% for s in range(n_slices) %}
@group(0) @binding({{ 5 + s }}) var<storage, read_write> gradient_{{ s }}: array<vec4<f32>>;
{% endfor %}

{% if dropout %}
// Of x counts what dropout leaves, for each member of A (parts/dropout.wgsl): keys of rows and of matrices.
@group(0) @binding({{ 5 + n_slices }}) var<storage, read> row_keys: array<u32>;
@group(0) @binding({{ 6 + n_slices }}) var<uniform> matrix_keys: vec4<u32>;

{% include "parts/dropout.wgsl" %}

{% endif %}
{% if splits > 1 %}
{% set most_sums = [parts[0].lane_left * parts[0].lane_right, parts[1].lane_left * parts[1].lane_right] | max // 4 %}

var<workgroup> sums: array<vec4<f32>, {{ lanes * most_sums }}>; // [vectors of a block, splits, blocks]
{% endif %}

{% include "parts/lora_gradient.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    add_gradients(group.x, group.z, lane);
}
