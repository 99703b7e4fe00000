// In place, for the heads h of q and of k (those of v keep their gradient):
//   d[m, h, i] ← rstd · (g[i] − x[m, h, i] · rstd² · mean_i(g · x)),   g[i] = d[m, h, i] · weight[i],
//   rstd as in head_norm.wgsl.
//
// Bindings: x and d [rows, width], q_weight and k_weight [head_size]. One workgroup a row and head;
// two sums in the tree of row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> q_weight: array<f32>;
@group(0) @binding(3) var<storage, read> k_weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> d: array<f32>;

const head_size = {{ head_size }}u;
const n_heads = {{ n_heads }}u;
const n_normed = {{ n_heads + n_kv_heads }}u;
const all_heads = {{ n_heads + 2 * n_kv_heads }}u;
const lanes = 64u;

{% include "row_sum.wgsl" %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x; // row · n_normed + head
    if (index >= extent.rows * n_normed) { return; }
    let head = index % n_normed;
    let base = (index / n_normed * all_heads + head) * head_size;
    var squares = 0.0;
    var products = 0.0;
    for (var i = lane; i < head_size; i += lanes) {
        let value = x[base + i];
        let weight = select(k_weight[i], q_weight[i], head < n_heads);
        squares += value * value;
        products += value * d[base + i] * weight;
    }
    let rstd = inverseSqrt(row_sum(squares, lane) / f32(head_size) + {{ epsilon }});
    let slope = row_sum(products, lane) / f32(head_size) * rstd * rstd;
    for (var i = lane; i < head_size; i += lanes) {
        let weight = select(k_weight[i], q_weight[i], head < n_heads);
        d[base + i] = rstd * (d[base + i] * weight - x[base + i] * slope);
    }
}
