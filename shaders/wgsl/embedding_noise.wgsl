// x[m, k] += magnitudes[m] · (2 · u − 1), u uniform in [0, 1) (Jain et al. 2023, "NEFTune"), in place.
//
// Bindings: x f32 [rows, {{ width }}], row_keys u32 [rows], magnitudes f32 [rows]. u is the upper 24 bits of a 32-bit
// hash of the row's key and the column, a counter-based generator (parts/dropout.wgsl). One lane four columns.

{% set quads = width // 4 %}
{% set dropout = {"threshold": 0} %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read_write> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> row_keys: array<u32>;
@group(0) @binding(3) var<storage, read> magnitudes: array<f32>;

{% include "parts/dropout.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / {{ quads }}u;
    if (row >= extent.rows || magnitudes[row] == 0.0) { return; }
    let quad = index % {{ quads }}u;
    let key = row_keys[row];
    let u = vec4<f32>({% for c in range(4) %}f32(mixed(key ^ column_key({{ key }}u, 4u * quad + {{ c }}u)) >> 8u){{ ", " if not loop.last }}{% endfor %}) * 0x1p-24;
    x[index] += magnitudes[row] * (2.0 * u - 1.0);
}
