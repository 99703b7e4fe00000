// In place, for the heads h of q and of k (those of v keep their gradient):
//   d[m, h, i] ← rstd · (g[i] − x[m, h, i] · rstd² · mean_i(g · x)),
//   g[i] = (d[m, h] turned back by the angles of positions[m])[i] · weight[i],   rstd as in head_norm_rope.wgsl.
//
// Bindings: x of {{ x_type }} and d of {{ out_type }} [rows, width], q_weight and k_weight [head_size], positions u32
// [rows], tables [n_positions, half, 2]. Lanes, columns and sums as in head_norm_rope.wgsl, the two
// sums at once.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> q_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> k_weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> d: array<vec4<{{ out_type }}>>;
{% if half > 0 %}
@group(0) @binding(5) var<storage, read> positions: array<u32>;
@group(0) @binding(6) var<storage, read> tables: array<vec4<f32>>;
{% endif %}

{% set n_normed = n_heads + n_kv_heads %}
{% set sum_type = "vec2<f32>" %}
{% from "head_parts.wgsl" import registers, load_head, load_angles, turn, store_head with context %}
{% from "stored.wgsl" import stored %}
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
    let row = index / {{ n_normed }}u;
    let head = index % {{ n_normed }}u;
    let base = (row * {{ n_normed + n_kv_heads }}u + head) * {{ head_size // 4 }}u + lane;
{{ load_head("value", "x", "base") }}
{{ load_head("g", "d", "base") }}
{{ load_head("w", "q_weight", "lane") }}
    if (head >= {{ n_heads }}u) {
{{ load_head("k_w", "k_weight", "lane") }}
{% for r in registers %}
        w_{{ r }} = k_w_{{ r }};
{% endfor %}
    }
{{ load_angles("row") }}
{{ turn("g", true) }}
    var squares = vec4<f32>();
    var products = vec4<f32>();
{% for r in registers %}
    g_{{ r }} *= w_{{ r }};
    squares += value_{{ r }} * value_{{ r }};
    products += value_{{ r }} * g_{{ r }};
{% endfor %}
    let sums = row_sum(vec2(dot(squares, vec4(1.0)), dot(products, vec4(1.0))), invocation);
    let rstd = inverseSqrt(sums.x / {{ head_size }}.0 + {{ epsilon }});
    let slope = sums.y / {{ head_size }}.0 * rstd * rstd;
    if (!inside) { return; }
{% call(r, at) store_head("base") %}
d[{{ at }}] = {{ stored("rstd * (g_%s - value_%s * slope)" % (r, r), out_type) }};
{% endcall %}
}
