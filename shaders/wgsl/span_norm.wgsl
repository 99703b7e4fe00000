// y[m, y_at + i] = x[m, x_at + i] · rstd · weight[i] for every group of columns of a span, i < size,
//   rstd = 1 / sqrt(mean_i x[m, x_at + i]² + epsilon);   a span without a weight: weight 1;
// one that is not normed: rstd 1.
//
// Bindings: x [rows, {{ x_stride }}] of {{ x_type }}, weight (those of the spans one after another), y [rows, {{ y_stride }}] of
// {{ y_type }}. One workgroup a row and group. A lane holds every {{ lanes }}th quad of columns and sums them in that
// order; the lanes' sums meet in row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<{{ y_type }}>>;

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
    var squares = vec4<f32>();
    for (var i = lane; i < quads; i += {{ lanes }}u) {
        let value = vec4<f32>(x[x_at + i]);
        squares += value * value;
    }
    let mean = row_sum(dot(squares, vec4(1.0)), lane) / f32(4u * quads);
    let rstd = select(1.0, inverseSqrt(mean + {{ epsilon }}), normed);
    for (var i = lane; i < quads; i += {{ lanes }}u) {
        var w = vec4(1.0);
        if (weighted) { w = weight[weight_at + i]; }
        let value = vec4<f32>(x[x_at + i]) * rstd * w;
        y[y_at + i] = {{ stored("value", y_type) }};
    }
}
