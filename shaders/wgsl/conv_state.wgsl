// state[i] = s[n − {{ taps - 1 }} + i] for the {{ taps - 1 }} rows that a text's next row needs, s as in causal_conv.wgsl;
//   before the first of its n rows here: what state had, or zero where the text begins here.
//
// Bindings: x [rows, {{ stride }}] of {{ x_type }}, positions [rows], state [{{ taps - 1 }}, {{ width }}]. One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read_write> state: array<vec4<f32>>;

{% include "parts/causal_conv.wgsl" %}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) at: vec3<u32>) {
    let column = at.x;
    if (column >= width || extent.rows == 0u) { return; }
    let goes_on = positions[0] > 0u;
{% for i in range(taps - 1) %}
    if (extent.rows >= {{ taps - 1 - i }}u) {
        state[{{ i }}u * width + column] = source(extent.rows - {{ taps - 1 - i }}u, column);
    } else if (goes_on) { // ascending: what is read has not been written
        state[{{ i }}u * width + column] = state[({{ i }}u + extent.rows) * width + column];
    } else {
        state[{{ i }}u * width + column] = vec4<f32>();
    }
{% endfor %}
}
