// largest[m] = the bits of max_k |x[m, x_column + k]|, k < {{ columns }}: a NaN's are larger than those of infinity.
// upper[m, k] + lower[m, k] = x[m, x_column + k] times the power of two that largest[m] asks for (parts/pairs.wgsl);
// zeros from column {{ columns }} to {{ padded_columns }}.
// Bindings: x [rows, {{ x_stride }}], largest u32 [rows], out u32 [2, {{ maximum_rows }}, {{ padded_columns }} / 2]: upper, then lower, two f16
// a word, four words an element{{ "; place" if placed }}. One workgroup a row, which it reads twice; no order matters.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> largest: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<u32>>;
{% if placed %}
struct Place { x_column: u32, out_column: u32 }
@group(0) @binding(4) var<uniform> place: Place;
{% endif %}

{% from "parts/pairs.wgsl" import packing, scaling, pairing %}
{{ packing() }}
{{ scaling() }}
{{ pairing() }}

{% from "parts/row_largest.wgsl" import declare_largest, find_largest %}
{{ declare_largest() }}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= extent.rows) { return; }
    let begin = (row * {{ x_stride }}u + {{ "place.x_column" if placed else "0u" }}) / 4u;
{{ find_largest(columns // 4, 256) }}
    let found = atomicLoad(&largest_bits);
    if (lane == 0u) { largest[row] = found; }
    let scale = power(exponent_for(found));
    let first = row * {{ padded_columns // 8 }}u;
    for (var eight = lane; eight < {{ padded_columns // 8 }}u; eight += 256u) {
{% if columns == padded_columns %}
        let made = pair(scale * x[begin + 2u * eight], scale * x[begin + 2u * eight + 1u]);
{% else %}
        let a = scale * x[begin + min(2u * eight, {{ columns // 4 - 1 }}u)];
        let b = scale * x[begin + min(2u * eight + 1u, {{ columns // 4 - 1 }}u)];
        let made = pair(
            select(vec4<f32>(), a, 2u * eight < {{ columns // 4 }}u),
            select(vec4<f32>(), b, 2u * eight + 1u < {{ columns // 4 }}u),
        );
{% endif %}
        out[first + eight] = made.upper;
        out[first + eight + {{ maximum_rows * padded_columns // 8 }}u] = made.lower;
    }
}
