// d_x[m, i] = rstd · (g[i] − x[m, i] · rstd² · mean_i(g · x)) + residual[m, i],
//   g[i] = d_y[m, i] · weight[i],   rstd = 1 / sqrt(mean_i x[m, i]² + epsilon).
//
// Bindings: x, d_y, residual, d_x [rows, width], weight [width]. In place (d_x is the residual) the
// residual is read from d_x. One workgroup a row; two sums in the tree of row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> weight: array<f32>;
@group(0) @binding(3) var<storage, read> d_y: array<f32>;
@group(0) @binding(4) var<storage, read_write> d_x: array<f32>;
{% if residual == "separate" %}
@group(0) @binding(5) var<storage, read> residual: array<f32>;
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
    var products = 0.0;
    for (var i = lane; i < width; i += lanes) {
        let value = x[base + i];
        squares += value * value;
        products += value * d_y[base + i] * weight[i];
    }
    let rstd = inverseSqrt(row_sum(squares, lane) / f32(width) + {{ epsilon }});
    let slope = row_sum(products, lane) / f32(width) * rstd * rstd;
    for (var i = lane; i < width; i += lanes) {
        let d = rstd * (d_y[base + i] * weight[i] - x[base + i] * slope);
{% if residual == "separate" %}
        d_x[base + i] = residual[base + i] + d;
{% elif residual == "in place" %}
        d_x[base + i] += d;
{% else %}
        d_x[base + i] = d;
{% endif %}
    }
}
