// d_x[m, x_at + i] {{ "+=" if accumulate else "=" }} rstd · (g[i] − x[m, x_at + i] · rstd² · mean_i(g[i] · x[m, x_at + i])),
//   g[i] = d_y[m, y_at + i] · weight[i],   rstd, groups and spans as in span_norm.wgsl.
//
// Bindings: x [rows, {{ x_stride }}] of {{ x_type }}, weight, {% if in_place %}d [rows, {{ y_stride }}] of {{ d_x_type }}: d_y, which becomes d_x{% else %}d_y [rows, {{ y_stride }}] of
// {{ d_y_type }}, d [rows, {{ d_stride }}] of {{ d_x_type }}: d_x{% endif %}. Lanes and sums as in span_norm.wgsl, the two sums at once.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> d: array<vec4<{{ d_x_type }}>>;
{% if not in_place %}
@group(0) @binding(4) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
{% endif %}

{% set source = "d" if in_place else "d_y" %}
{% set sum_type = "vec2<f32>" %}
{% from "parts/stored.wgsl" import stored %}
{% from "parts/spans.wgsl" import take_group with context %}
{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
{{ take_group() }}
    let d_at = x_at{{ " - row * " ~ (x_stride // 4) ~ "u + row * " ~ (d_stride // 4) ~ "u" if d_stride != x_stride }};
    var squares = vec4<f32>();
    var products = vec4<f32>();
    for (var i = lane; i < quads; i += {{ lanes }}u) {
        var w = vec4(1.0);
        if (weighted) { w = weight[weight_at + i]; }
        let value = vec4<f32>(x[x_at + i]);
        squares += value * value;
        products += value * vec4<f32>({{ source }}[y_at + i]) * w;
    }
    let sums = row_sum(vec2(dot(squares, vec4(1.0)), dot(products, vec4(1.0))), lane);
    let width = f32(4u * quads);
    let rstd = select(1.0, inverseSqrt(sums.x / width + {{ epsilon }}), normed);
    let slope = select(0.0, sums.y / width * rstd * rstd, normed);
    for (var i = lane; i < quads; i += {{ lanes }}u) {
        var w = vec4(1.0);
        if (weighted) { w = weight[weight_at + i]; }
        let gradient = rstd * (vec4<f32>({{ source }}[y_at + i]) * w - vec4<f32>(x[x_at + i]) * slope);
        d[d_at + i] = {{ stored("vec4<f32>(d[d_at + i]) + gradient" if accumulate else "gradient", d_x_type) }};
    }
}
