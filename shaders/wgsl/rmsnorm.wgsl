// y[m, i] = x[m, i] · rstd[m] · weight[i] (+ residual[m, i]),   rstd[m] = 1 / sqrt(mean_i x[m, i]² + epsilon)
//
// Bindings: x [rows, width], weight [width], y [rows, width], residual [rows, width].
// One workgroup a row. A lane sums the columns lane, lane + 64, …; the 64 sums meet in a tree.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
{% if residual %}
@group(0) @binding(4) var<storage, read> residual: array<f32>;
{% endif %}

const width = {{ width }}u;
const lanes = 64u;

{% include "row_sum.wgsl" %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= extent.rows) { return; }
    let base = row * width;
    var squares = 0.0;
    for (var i = lane; i < width; i += lanes) {
        let value = x[base + i];
        squares += value * value;
    }
    let rstd = inverseSqrt(row_sum(squares, lane) / f32(width) + {{ epsilon }});
    for (var i = lane; i < width; i += lanes) {
        y[base + i] = {{ "residual[base + i] + " if residual }}x[base + i] * rstd * weight[i];
    }
}
