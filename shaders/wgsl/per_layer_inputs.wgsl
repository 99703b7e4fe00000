// y[m, l, i] ← (y[m, l, i] · rstd · weight[i] + {{ scale }} · table[m, l, i]) / sqrt(2), in place, for every layer l,
//   rstd = 1 / sqrt(mean_i y[m, l, i]² + epsilon).
//
// Bindings: y [rows, layers, {{ 4 * quads }}] of {{ y_type }}, weight [{{ 4 * quads }}], table f32 shaped as y. One workgroup a row and
// layer. A lane holds every {{ lanes }}th quad and sums them in that order; the lanes' sums meet in row_sum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<{{ y_type }}>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> table: array<vec4<f32>>;

{% from "parts/stored.wgsl" import stored %}
{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    if (index >= extent.rows * {{ n_layers }}u) { return; } // uniform: the whole workgroup leaves
    let first = index * {{ quads }}u;
    var squares = vec4<f32>();
    for (var i = lane; i < {{ quads }}u; i += {{ lanes }}u) {
        let value = vec4<f32>(y[first + i]);
        squares += value * value;
    }
    let rstd = inverseSqrt(row_sum(dot(squares, vec4(1.0)), lane) / {{ 4 * quads }}.0 + {{ epsilon }});
    for (var i = lane; i < {{ quads }}u; i += {{ lanes }}u) {
        let value = vec4<f32>(y[first + i]) * rstd * weight[i] + {{ scale }} * table[first + i];
        y[first + i] = {{ stored("value * 0.7071067811865476", y_type) }};
    }
}
