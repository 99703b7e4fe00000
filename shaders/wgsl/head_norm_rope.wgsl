// y[m, h] = turned(x[m, h] · rstd[m, h] · weight) for the heads h of q and of k, each with its own weight,
//   rstd[m, h] = 1 / sqrt(mean_i x[m, h, i]² + epsilon), turned by the angles of positions[m] as in
//   rope.wgsl;   y[m, h] = x[m, h] for the heads of v.
//
// Bindings: x [rows, width] of {{ x_type }} (heads of q, of k, of v), q_weight and k_weight [head_size],
// y [rows, width] of {{ out_type }}, positions u32 [rows], tables [n_positions, half, 2] (cos, sin).
// {{ sum_lanes }} lanes a row and head, {{ lanes // sum_lanes }} of these a workgroup. A lane holds every {{ sum_lanes }}th quad of columns of each
// stretch (head_parts.wgsl) and sums them in that order; the lanes' sums meet in row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> q_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> k_weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> y: array<vec4<{{ out_type }}>>;
{% if half > 0 %}
@group(0) @binding(5) var<storage, read> positions: array<u32>;
@group(0) @binding(6) var<storage, read> tables: array<vec4<f32>>;
{% endif %}

{% set all_heads = n_heads + 2 * n_kv_heads %}
{% from "head_parts.wgsl" import registers, load_head, load_angles, turn, store_head with context %}
{% from "stored.wgsl" import stored %}
{% include "row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
    let first_index = (group.x + group.y * groups.x) * {{ lanes // sum_lanes }}u; // row · all heads + head
    let n_indices = extent.rows * {{ all_heads }}u;
    if (first_index >= n_indices) { return; } // uniform: the whole workgroup leaves
    let own_index = first_index + invocation / {{ sum_lanes }}u;
    let inside = own_index < n_indices; // one that is not repeats the last head and stores nothing
    let index = min(own_index, n_indices - 1u);
    let lane = invocation % {{ sum_lanes }}u;
    let head = index % {{ all_heads }}u;
    let base = index * {{ head_size // 4 }}u + lane;
{{ load_head("value", "x", "base") }}
{{ load_head("w", "q_weight", "lane") }}
    if (head >= {{ n_heads }}u) {
{{ load_head("k_w", "k_weight", "lane") }}
{% for r in registers %}
        w_{{ r }} = k_w_{{ r }};
{% endfor %}
    }
{{ load_angles("index / %du" % all_heads) }}
    var squares = vec4<f32>();
{% for r in registers %}
    squares += value_{{ r }} * value_{{ r }};
{% endfor %}
    let sum = row_sum(dot(squares, vec4(1.0)), invocation);
    let rstd = inverseSqrt(sum / {{ head_size }}.0 + {{ epsilon }});
    if (!inside) { return; }
    if (head < {{ n_heads + n_kv_heads }}u) {
{% for r in registers %}
        value_{{ r }} = value_{{ r }} * rstd * w_{{ r }};
{% endfor %}
{{ turn("value", false) }}
    }
{% call(r, at) store_head("base") %}
y[{{ at }}] = {{ stored("value_" ~ r, out_type) }};
{% endcall %}
}
