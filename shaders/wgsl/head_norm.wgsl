// y[m, h] = x[m, h] · rstd[m, h] · weight for the heads h of q and of k, each with its own weight,
//   rstd[m, h] = 1 / sqrt(mean_i x[m, h, i]² + epsilon);   y[m, h] = x[m, h] for the heads of v.
//
// Bindings: x [rows, width] (heads of q, of k, of v), q_weight and k_weight [head_size],
// y [rows, width]. One workgroup a row and head; the sum in the tree of row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> q_weight: array<f32>;
@group(0) @binding(3) var<storage, read> k_weight: array<f32>;
@group(0) @binding(4) var<storage, read_write> y: array<f32>;

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
    let index = group.x + group.y * groups.x; // row · all_heads + head
    if (index >= extent.rows * all_heads) { return; }
    let head = index % all_heads;
    let base = index * head_size;
    if (head >= n_normed) { // uniform: the whole workgroup has one head
        for (var i = lane; i < head_size; i += lanes) { y[base + i] = x[base + i]; }
        return;
    }
    var squares = 0.0;
    for (var i = lane; i < head_size; i += lanes) {
        let value = x[base + i];
        squares += value * value;
    }
    let rstd = inverseSqrt(row_sum(squares, lane) / f32(head_size) + {{ epsilon }});
    for (var i = lane; i < head_size; i += lanes) {
        let weight = select(k_weight[i], q_weight[i], head < n_heads);
        y[base + i] = x[base + i] * rstd * weight;
    }
}
