// In place, for the heads h of q and of k (those of v keep their gradient):
//   d[m, h, i] ← rstd · (g[i] − x[m, h, i] · rstd² · mean_i(g · x)),   g[i] = d[m, h, i] · weight[i],
//   rstd as in head_norm.wgsl.
//
// Bindings: x and d [rows, width], q_weight and k_weight [head_size]. Lanes, columns and sums as in
// head_norm.wgsl, the two sums at once.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> q_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> k_weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> d: array<vec4<f32>>;

{% set n_normed = n_heads + n_kv_heads %}
{% set quads = head_size // 4 %}
{% set steps = (quads + sum_lanes - 1) // sum_lanes %}
{% set sum_type = "vec2<f32>" %}
{% from "row_parts.wgsl" import load_row, store_row %}
{% include "row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let first_index = (group.x + group.y * groups.x) * {{ lanes // sum_lanes }}u; // row · normed heads + head
    let n_indices = extent.rows * {{ n_normed }}u;
    if (first_index >= n_indices) { return; } // uniform: the whole workgroup leaves
    let own_index = first_index + invocation / {{ sum_lanes }}u;
    let inside = own_index < n_indices; // one that is not repeats the last head and stores nothing
    let index = min(own_index, n_indices - 1u);
    let lane = invocation % {{ sum_lanes }}u;
    let head = index % {{ n_normed }}u;
    let base = (index / {{ n_normed }}u * {{ n_normed + n_kv_heads }}u + head) * {{ quads }}u + lane;
{{ load_row("value", "x", "base", quads, sum_lanes) }}
{{ load_row("g", "d", "base", quads, sum_lanes) }}
{{ load_row("w", "q_weight", "lane", quads, sum_lanes) }}
    if (head >= {{ n_heads }}u) {
{{ load_row("k_w", "k_weight", "lane", quads, sum_lanes) }}
{% for s in range(steps) %}
        w_{{ s }} = k_w_{{ s }};
{% endfor %}
    }
    var squares = vec4<f32>();
    var products = vec4<f32>();
{% for s in range(steps) %}
    g_{{ s }} *= w_{{ s }};
    squares += value_{{ s }} * value_{{ s }};
    products += value_{{ s }} * g_{{ s }};
{% endfor %}
    let sums = row_sum(vec2(dot(squares, vec4(1.0)), dot(products, vec4(1.0))), invocation);
    let rstd = inverseSqrt(sums.x / {{ head_size }}.0 + {{ epsilon }});
    let slope = sums.y / {{ head_size }}.0 * rstd * rstd;
    if (!inside) { return; }
{% for s in range(steps) %}
{% call store_row(s, quads, sum_lanes) %}
d[base + {{ s * sum_lanes }}u] = rstd * (g_{{ s }} - value_{{ s }} * slope);
{% endcall %}
{% endfor %}
}
