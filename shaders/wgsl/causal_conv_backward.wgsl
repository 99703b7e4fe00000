// Gradient of causal_conv.wgsl to what is convolved{{ " and to C" if gated }}, the weight being frozen:
//   d_s[m, i] = Σ_k weight[{{ taps - 1 }} − k, i] · d_c[m + k, i],   k ascending, over the rows of m's example
{% if gated %}
//   d_c = d_y · C,   d_C = d_y · c,   d_B = d_s · x,   d_x = d_s · B
{% else %}
//   d_c = d_y · σ(c) · (1 + c · (1 − σ(c)))
{% endif %}
// c is computed again{{ ", and with it y [rows, " ~ width ~ "] of " ~ y_type ~ ", to the bits of causal_conv.wgsl" if y_type }}.
//
// Bindings: x [rows, {{ stride }}] of {{ x_type }}, weight [{{ taps }}, {{ width }}], segments [rows, 2], d_y [rows, {{ width }}] of {{ d_y_type }},
// d_x [rows, {{ stride }}] of {{ d_x_type }}{{ "" if gated else ", of which the first " ~ width ~ " columns are written" }}. One lane a row and four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(4) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
@group(0) @binding(5) var<storage, read_write> d_x: array<vec4<{{ d_x_type }}>>;
{% if y_type %}
@group(0) @binding(6) var<storage, read_write> y: array<vec4<{{ y_type }}>>;
{% endif %}

{% from "parts/stored.wgsl" import stored %}
{% include "parts/causal_conv.wgsl" %}

fn convolved(row: u32, first: u32, column: u32) -> vec4<f32> {
    var c = vec4<f32>();
{% for j in range(taps) %}
    if (row >= first + {{ taps - 1 - j }}u) {
        c += weight[{{ j }}u * width + column] * source(row - {{ taps - 1 - j }}u, column);
    }
{% endfor %}
    return c;
}

// Of c in a row.
fn gradient(row: u32, first: u32, column: u32) -> vec4<f32> {
    let d = vec4<f32>(d_y[row * width + column]);
{% if gated %}
    return d * vec4<f32>(x[row * stride + width + column]);
{% else %}
    let c = convolved(row, first, column);
    let s = vec4(1.0) / (vec4(1.0) + exp(-c));
    return d * s * (vec4(1.0) + c * (vec4(1.0) - s));
{% endif %}
}

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
    let first = segments[row].x;
    let end = min(segments[row].y, extent.rows);
    var d_s = vec4<f32>();
{% for k in range(taps) %}
    if (row + {{ k }}u < end) {
        d_s += weight[{{ taps - 1 - k }}u * width + column] * gradient(row + {{ k }}u, first, column);
    }
{% endfor %}
    let at = row * stride + column;
{% if gated %}
    let d_b = d_s * vec4<f32>(x[at + 2u * width]);
    let c = convolved(row, first, column);
    let d_c = vec4<f32>(d_y[index]) * c;
    let d_third = d_s * vec4<f32>(x[at]);
    d_x[at] = {{ stored("d_b", d_x_type) }};
    d_x[at + width] = {{ stored("d_c", d_x_type) }};
    d_x[at + 2u * width] = {{ stored("d_third", d_x_type) }};
{% if y_type %}
    let value = vec4<f32>(x[at + width]) * c;
    y[index] = {{ stored("value", y_type) }};
{% endif %}
{% else %}
    d_x[at] = {{ stored("d_s", d_x_type) }};
{% endif %}
}
