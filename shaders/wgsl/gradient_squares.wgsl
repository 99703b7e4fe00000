// g[i] = Σ_s gradient_s[i] (into slice 0, in the order of the slices), and
// partial[first_partial + group] = Σ of g[i]² over the workgroup's stretch of {{ stretch }} quads.
//
// Bindings: gradient_s [n], one of each slice; partial [n_partials]. Lanes stride by quads, then
// row_sum.

@group(0) @binding(0) var<storage, read_write> partial: array<f32>;
@group(0) @binding(1) var<storage, read_write> gradient_0: array<vec4<f32>>;
{% for s in range(1, n_slices) %}
@group(0) @binding({{ 1 + s }}) var<storage, read> gradient_{{ s }}: array<vec4<f32>>;
{% endfor %}

{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = group.x * {{ stretch }}u;
    let last = min(first + {{ stretch }}u, {{ n // 4 }}u);
    var squares = vec4<f32>();
    for (var i = first + lane; i < last; i += {{ lanes }}u) {
{% if n_slices > 1 %}
        let g = gradient_0[i]{% for s in range(1, n_slices) %} + gradient_{{ s }}[i]{% endfor %};
        gradient_0[i] = g;
{% else %}
        let g = gradient_0[i];
{% endif %}
        squares += g * g;
    }
    let whole = row_sum(dot(squares, vec4(1.0)), lane);
    if (lane == 0u) { partial[{{ first_partial }}u + group.x] = whole; }
}
