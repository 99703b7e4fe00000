// Gradients of the factors as in lora_gradient.wgsl, on matrix units:
// d_A[i, j] += Σ_m d_z[m, i] · x[m, j]   and, for each member g and its rows i of B,
// d_B[i, j] += scale · Σ_m d_y[m, column_g + i] · z[m, g · rank + j]
//
// Bindings: x [rows, {{ parts[0].long_stride }}] of {{ parts[0].long_type }}, z [rows, {{ parts[1].short_stride }}], d_y [rows, {{ parts[1].long_stride }}] of {{ parts[1].long_type }}, d_z [rows, {{ parts[0].short_stride }}]; gradient_s,
// one of each slice s: d_A and, from vec4 {{ parts[1].start }} on, d_B. The rows in use are cut into {{ n_slices }} equal stretches;
// workgroups with z = s sum stretch s and add it to slice s. The first {{ parts[0].n_groups }} workgroups make d_A, the others d_B.
// A workgroup has {{ long }} elements along a gradient's longer side and all along its shorter one, a subgroup {{ n }} along
// the longer. {{ depth }} rows at a time lie in workgroup memory, as f16; sums are f32, rows ascend. d_z may be far below
// f16's numbers, where B is small: d_z and z are scaled by a power of two, which follows their largest number.
// x and d_y are bound as eights of f16 where they are, and nothing is done to them on the way.
// So are x and d_y where they are f32, by that of the rows in workgroup memory.
{% if d_y_copied %}
// d_y is the copy that rmsnorm_backward.wgsl writes: the powers of its rows, by d_y_largest [rows], are taken out of z.
{% endif %}
{% if dropout %}
// Of x counts what dropout leaves, for each member of A (parts/dropout.wgsl: row_keys u32 [rows], matrix_keys), whose
// rows have workgroups of their own.
{% endif %}
{% if p_type %}
// Of d_y counts scales[column] · d_y in d_B, and beside it, from vec4 {{ parts[1].magnitudes }} of a slice on,
// d_magnitudes[i] += inverses[column_g + i] · Σ_m d_y[m, column_g + i] · p[m, column_g + i]   with p as d_y is laid out.
{% endif %}
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
{% set next = 5 + n_slices %}
{% if dropout %}
@group(0) @binding({{ next }}) var<storage, read> row_keys: array<u32>;
@group(0) @binding({{ next + 1 }}) var<uniform> matrix_keys: vec4<u32>;
{% set next = next + 2 %}

{% include "parts/dropout.wgsl" %}
{% endif %}
{% if d_y_copied %}
@group(0) @binding({{ next }}) var<storage, read> d_y_largest: array<u32>;
{% set next = next + 1 %}
{% endif %}
{% if p_type %}
@group(0) @binding({{ next }}) var<storage, read> p: array<vec4<{{ "u32" if parts[1].eights else p_type }}>>;
@group(0) @binding({{ next + 1 }}) var<storage, read> scales: array<f32>;
@group(0) @binding({{ next + 2 }}) var<storage, read> inverses: array<vec4<f32>>;
{% endif %}

const lanes = {{ long // n * subgroup_lanes }}u;
// Of the longer side [depth][long / 8 + 1], then of the shorter [depth][width / 8 + 1], eight f16 an element;
// fragments that leave pass through the beginning, four f32 an element.
var<workgroup> tiles: array<vec4<u32>, {{ tiles }}>;

{{ pack_eight() }}
{% include "parts/lora_gradient_matrix.wgsl" %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
{% if not emulated %}
    @builtin(subgroup_id) team: u32,
{% endif %}
) {
{% if emulated %}
    let team = lane / {{ subgroup_lanes }}u;
{% endif %}
    add_gradients(group.x, group.z, lane, team);
}
