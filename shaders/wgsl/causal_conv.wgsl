{% if gated %}
// y[m, i] = C[m, i] · c[m, i] with s = B · x,   B, C, x the three thirds of a row of x   (LFM2)
{% else %}
// y[m, i] = c[m, i] · sigmoid(c[m, i]) with s the first {{ width }} columns of x
{% endif %}
//   c[m, i] = Σ_j weight[j, i] · s[m − {{ taps - 1 }} + j, i],   j ascending
{% if text %}
// over the rows of a text: those before row 0 lie in state, and are zero where the text begins there.
{% else %}
// over the rows of m's example; those before its first are zero.
{% endif %}
//
// Bindings: x [rows, {{ stride }}] of {{ x_type }}, weight [{{ taps }}, {{ width }}], {{ "positions [rows], state [" ~ (taps - 1) ~ ", " ~ width ~ "]" if text else "segments [rows, 2]" }},
// y [rows, {{ width }}] of {{ y_type }}. One lane a row and four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<{{ y_type }}>>;
{% if text %}
@group(0) @binding(4) var<storage, read> positions: array<u32>;
@group(0) @binding(5) var<storage, read> state: array<vec4<f32>>;
{% else %}
@group(0) @binding(4) var<storage, read> segments: array<vec2<u32>>;
{% endif %}

{% from "parts/stored.wgsl" import stored %}
{% include "parts/causal_conv.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / width;
    if (row >= extent.rows) { return; }
    let column = index % width;
{% if text %}
    let first = 0u;
    let goes_on = positions[0] > 0u;
{% else %}
    let first = segments[row].x;
{% endif %}
    var c = vec4<f32>();
{% for j in range(taps) %}
{% set back = taps - 1 - j %}
    if (row >= first + {{ back }}u) {
        c += weight[{{ j }}u * width + column] * source(row - {{ back }}u, column);
    }{% if text and back %} else if (goes_on) {
        c += weight[{{ j }}u * width + column] * state[(row + {{ j }}u) * width + column];
    }{% endif %}

{% endfor %}
{% if gated %}
    let value = vec4<f32>(x[row * stride + width + column]) * c;
{% else %}
    let value = c / (vec4(1.0) + exp(-c));
{% endif %}
    y[index] = {{ stored("value", y_type) }};
}
