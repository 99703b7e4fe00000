// y[m, h] = x[m, h] · rstd[m, h] · weight for the heads h of q and of k, each with its own weight,
//   rstd[m, h] = 1 / sqrt(mean_i x[m, h, i]² + epsilon);   y[m, h] = x[m, h] for the heads of v.
//
// Bindings: x [rows, width] (heads of q, of k, of v), q_weight and k_weight [head_size],
// y [rows, width]. {{ sum_lanes }} lanes a row and head, {{ lanes // sum_lanes }} of these a workgroup. A lane holds the quads of columns
// lane, lane + {{ sum_lanes }}, … and sums them in that order; the lanes' sums meet in row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> q_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> k_weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y: array<vec4<f32>>;

{% set quads = head_size // 4 %}
{% set steps = (quads + sum_lanes - 1) // sum_lanes %}
{% from "row_parts.wgsl" import load_row, store_row %}
{% include "row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let first_index = (group.x + group.y * groups.x) * {{ lanes // sum_lanes }}u; // row · all heads + head
    let n_indices = extent.rows * {{ n_heads + 2 * n_kv_heads }}u;
    if (first_index >= n_indices) { return; } // uniform: the whole workgroup leaves
    let index = first_index + invocation / {{ sum_lanes }}u;
    let inside = index < n_indices; // one that is not repeats the last head and stores nothing
    let lane = invocation % {{ sum_lanes }}u;
    let head = index % {{ n_heads + 2 * n_kv_heads }}u;
    let base = min(index, n_indices - 1u) * {{ quads }}u + lane;
{{ load_row("value", "x", "base", quads, sum_lanes) }}
{{ load_row("w", "q_weight", "lane", quads, sum_lanes) }}
    if (head >= {{ n_heads }}u) {
{{ load_row("k_w", "k_weight", "lane", quads, sum_lanes) }}
{% for s in range(steps) %}
        w_{{ s }} = k_w_{{ s }};
{% endfor %}
    }
    var squares = vec4<f32>();
{% for s in range(steps) %}
    squares += value_{{ s }} * value_{{ s }};
{% endfor %}
    let sum = row_sum(dot(squares, vec4(1.0)), invocation);
    let rstd = inverseSqrt(sum / {{ head_size }}.0 + {{ epsilon }});
    if (!inside) { return; }
    let is_v = head >= {{ n_heads + n_kv_heads }}u;
{% for s in range(steps) %}
{% call store_row(s, quads, sum_lanes) %}
y[base + {{ s * sum_lanes }}u] = select(value_{{ s }} * rstd * w_{{ s }}, value_{{ s }}, is_v);
{% endcall %}
{% endfor %}
}
