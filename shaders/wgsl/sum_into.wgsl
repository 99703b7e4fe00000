// total[{{ slot }}] += Σ_m values[m] over the rows in use. One workgroup; lanes stride, then a tree.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> values: array<f32>;
@group(0) @binding(2) var<storage, read_write> total: array<f32>;

const lanes = 64u;

{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size(lanes)
fn main(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var m = lane; m < extent.rows; m += lanes) { sum += values[m]; }
    let whole = row_sum(sum, lane);
    if (lane == 0u) { total[{{ slot }}] += whole; }
}
