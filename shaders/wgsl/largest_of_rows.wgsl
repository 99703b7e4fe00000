// largest[m] = the bits of max_k |x[m, x_column + k]|, k < {{ columns }}: a NaN's are larger than those of infinity.
// Bindings: x [rows, {{ x_stride }}], largest u32 [rows]{{ ", place" if placed }}. One workgroup a row; no order matters.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> largest: array<u32>;
{% if placed %}
struct Place { x_column: u32, out_column: u32 }
@group(0) @binding(3) var<uniform> place: Place;
{% endif %}

{% from "parts/row_largest.wgsl" import declare_largest, find_largest %}
{{ declare_largest() }}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= extent.rows) { return; }
    let begin = (row * {{ x_stride }}u + {{ "place.x_column" if placed else "0u" }}) / 4u;
{{ find_largest(columns // 4, 64) }}
    if (lane == 0u) { largest[row] = atomicLoad(&largest_bits); }
}
