// halves[m, k] = x[m, k] · 2^e[m] in f16, as tiles of f16 hold it: 2^e brings the row's largest number to 2^4 … 2^5
// (parts/row_power.wgsl); largest[m] = the bits of that number, as largest_of_rows.wgsl finds it.
//
// Bindings: x [rows, {{ columns }}], halves in eights [rows, {{ columns // 8 }}], largest u32 [rows]. One workgroup a row; no order matters.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> halves: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read_write> largest: array<u32>;
{% from "parts/row_power.wgsl" import row_power %}

const eights = {{ columns // 8 }}u;
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
    let begin = row * {{ columns // 4 }}u;
{{ find_largest(columns // 4, 256) }}
    let size = atomicLoad(&largest_bits);
    if (lane == 0u) { largest[row] = size; }
    let power = {{ row_power("size") }};
    for (var eight = lane; eight < eights; eight += 256u) {
        let a = power * x[begin + 2u * eight];
        let b = power * x[begin + 2u * eight + 1u];
        halves[row * eights + eight] =
            vec4(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
    }
}
