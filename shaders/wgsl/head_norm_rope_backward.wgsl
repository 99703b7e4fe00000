// In place, for the heads h of q and of k (those of v keep their gradient):
//   d[m, h, i] ← rstd · (g[i] − x[m, h, i] · rstd² · mean_i(g · x)),
//   g[i] = (d[m, h] turned back by the angles of positions[m])[i] · weight[i],   rstd as in head_norm_rope.wgsl.
//
// Bindings: x of {{ x_type }} and d of {{ out_type }} [rows, width], q_weight and k_weight [head_size], positions u32
// [rows], tables [n_positions, half, 2]. Lanes, columns and sums as in head_norm_rope.wgsl, the two
// sums at once.

{% with output = "d" %}{% include "parts/head_bindings.wgsl" %}{% endwith %}

{% set n_normed = n_heads + n_kv_heads %}
{% set sum_type = "vec2<f32>" %}
{% from "parts/head_parts.wgsl" import registers, take_head, load_head, load_weight, load_angles, turn, store_head with context %}
{% from "parts/stored.wgsl" import stored %}
{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
{{ take_head("normed", n_normed) }}
    let row = index / {{ n_normed }}u;
    let head = index % {{ n_normed }}u;
    let base = (row * {{ n_normed + n_kv_heads }}u + head) * {{ head_size // 4 }}u + lane;
{{ load_head("value", "x", "base") }}
{{ load_head("g", "d", "base") }}
{{ load_weight() }}
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
