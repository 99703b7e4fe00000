// y[m, h] = turned(x[m, h] · rstd[m, h] · weight) for the heads h of q and of k, each with its own weight,
//   rstd[m, h] = 1 / sqrt(mean_i x[m, h, i]² + epsilon), turned by the angles of positions[m] as in
//   rope.wgsl;   y[m, h] = x[m, h] for the heads of v.
//
// Bindings: x [rows, width] of {{ x_type }} (heads of q, of k, of v), q_weight and k_weight [head_size],
// y [rows, width] of {{ out_type }}, positions u32 [rows], tables [n_positions, half, 2] (cos, sin).
// {{ sum_lanes }} lanes a row and head, {{ lanes // sum_lanes }} of these a workgroup. A lane holds every {{ sum_lanes }}th quad of columns of each
// stretch (head_parts.wgsl) and sums them in that order; the lanes' sums meet in row_sum.
{% if splits > 1 %}
// x is the partial sums [{{ splits }}, maximum rows, width] that a product leaves; their sum, in the order of
// matmul_reduce.wgsl, is written to raw, of {{ x_type }}.
{% endif %}

{% with output = "y", x_type = "f32" if splits > 1 else x_type %}{% include "parts/head_bindings.wgsl" %}{% endwith %}

{% if splits > 1 %}
@group(0) @binding({{ 7 if half > 0 else 5 }}) var<storage, read_write> raw: array<vec4<{{ x_type }}>>;
{% endif %}

{% set all_heads = n_heads + 2 * n_kv_heads %}
{% from "parts/head_parts.wgsl" import registers, take_head, load_head, load_weight, load_angles, turn, store_head with context %}
{% from "parts/stored.wgsl" import stored %}
{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) invocation: u32,
) {
{{ take_head("all", all_heads) }}
    let head = index % {{ all_heads }}u;
    let base = index * {{ head_size // 4 }}u + lane;
{{ load_head("value", "x", "base", splits, maximum_rows * all_heads * head_size // 4) }}
{% if splits > 1 and x_type == "f16" %}
{% for r in registers %}
    value_{{ r }} = vec4<f32>({{ stored("value_" ~ r, x_type) }});
{% endfor %}
{% endif %}
{{ load_weight() }}
{{ load_angles("index / %du" % all_heads) }}
    var squares = vec4<f32>();
{% for r in registers %}
    squares += value_{{ r }} * value_{{ r }};
{% endfor %}
    let sum = row_sum(dot(squares, vec4(1.0)), invocation);
    let rstd = inverseSqrt(sum / {{ head_size }}.0 + {{ epsilon }});
    if (!inside) { return; }
{% if splits > 1 %}
{% call(r, at) store_head("base") %}
raw[{{ at }}] = {{ stored("value_" ~ r, x_type) }};
{% endcall %}
{% endif %}
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
