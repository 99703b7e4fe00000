// A row as whole numbers (int_row_store.wgsl): of v = y ∘ next_weight, or of y itself{% if not next_norm %} (here){% endif %};
{% if norm %}
// y = x · rstd ∘ weight{{ " + residual" if residual }},   rstd = 1 / sqrt(mean_i x[i]² + epsilon), which is written, too.
{% else %}
// y = x.
{% endif %}
//
// Bindings: x [width], int_row u32, then what there is of weight, y, residual, next_weight, each [width].
// {{ "One workgroup, since the norm needs the whole row." if norm else "A workgroup has %d columns." % (4 * lanes) }}

{% set binding = namespace(next=2) %}
{% macro bind(name, access="read") %}
@group(0) @binding({{ binding.next }}) var<storage, {{ access }}> {{ name }}: array<vec4<f32>>;
{% set binding.next = binding.next + 1 %}
{% endmacro %}
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read_write> int_row: array<u32>;
{% if norm %}
{{ bind("weight") }}
{{ bind("y", "read_write") }}
{% if residual %}
{{ bind("residual") }}
{% endif %}
{% endif %}
{% if next_norm %}
{{ bind("next_weight") }}
{% endif %}

{% set quads = width // 4 %}
{% set rounds = (quads + lanes - 1) // lanes if norm else 1 %}
const lanes = {{ lanes }}u;
const quads = {{ quads }}u;

{% with int_blocks = width // 32, int_quads = lanes %}{% include "parts/int_row_store.wgsl" %}{% endwith %}
{% if norm %}
{% include "parts/row_sum.wgsl" %}
{% endif %}

@compute @workgroup_size(lanes)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let first = {{ "lane" if norm else "group.x * lanes + lane" }};
    // Lanes past the end take the last columns once more, for barriers follow, and store nothing.
{% for r in range(rounds) %}
    let quad_{{ r }} = min(first + {{ r * lanes }}u, quads - 1u);
    var y_{{ r }} = x[quad_{{ r }}];
{% endfor %}
{% if norm %}
    var squares = 0.0;
{% for r in range(rounds) %}
    if (first + {{ r * lanes }}u < quads) { squares += dot(y_{{ r }}, y_{{ r }}); }
{% endfor %}
    let rstd = inverseSqrt(row_sum(squares, lane) / {{ width }}.0 + {{ epsilon }});
{% endif %}
{% for r in range(rounds) %}
{% if norm %}
    y_{{ r }} = y_{{ r }} * rstd * weight[quad_{{ r }}]{{ " + residual[quad_%d]" % r if residual }};
    if (first + {{ r * lanes }}u < quads) { y[quad_{{ r }}] = y_{{ r }}; }
{% endif %}
    let v_{{ r }} = y_{{ r }}{{ " * next_weight[quad_%d]" % r if next_norm }};
{% if r %}
    workgroupBarrier();
{% endif %}
    share_quad(lane, v_{{ r }}, y_{{ r }});
    workgroupBarrier();
    if (first + {{ r * lanes }}u < quads) { store_quad(lane, quad_{{ r }}, v_{{ r }}); }
{% endfor %}
}
