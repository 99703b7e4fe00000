// d_gate = d_y · up · activation'(gate),  d_up = d_y · activation(gate); layouts as in swiglu.wgsl, d_y
// of {{ d_y_type }}, gate_up of {{ x_type }}, d_gate_up of {{ out_type }}.
{% if gate_power != 1 or gated_power != 1 %}
// Here of y = {{ gated_power }} · activation({{ gate_power }} · gate) · up.
{% endif %}
// In place (d_gate_up is gate_up) both are read before they are overwritten. Lanes as in swiglu.wgsl.
{% if splits > 1 %}
// d_y is in no array: it is Σ_s partial[s, m, i], in the order of matmul_reduce.wgsl, of the partial sums
// [{{ splits }}, maximum rows, {{ width }}] that a product leaves, rounded as d_y would be.
{% endif %}
{% if gated_type %}
// gated [rows, {{ width }}] of {{ gated_type }} is what swiglu.wgsl gave, to its bits.
{% endif %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
{% if splits == 1 %}
@group(0) @binding(1) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
{% else %}
@group(0) @binding(1) var<storage, read> partial: array<vec4<f32>>;
{% endif %}
@group(0) @binding(2) var<storage, read_write> d_gate_up: array<vec4<{{ out_type }}>>;
{% if not in_place %}
@group(0) @binding(3) var<storage, read> gate_up: array<vec4<{{ x_type }}>>;
{% endif %}
{% if gated_type %}
@group(0) @binding({{ 3 if in_place else 4 }}) var<storage, read_write> gated: array<vec4<{{ gated_type }}>>;
{% endif %}
{% set source = "d_gate_up" if in_place else "gate_up" %}

const row_quads = {{ width // 4 }}u; // of d_y

{% from "parts/stored.wgsl" import stored %}
{% from "parts/row_parts.wgsl" import added %}
{% include "parts/activation.wgsl" %}
{% set gate_scale = "%s * " % gate_power if gate_power != 1 else "" %}
{% set gated_scale = " * %s" % gated_power if gated_power != 1 else "" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index_0 = (group.x + group.y * groups.x) * {{ lanes * quads }}u + lane;
    let n = extent.rows * row_quads;
    if (index_0 >= n) { return; }
{% for q in range(quads) %}
{% if q > 0 %}
    let index_{{ q }} = min(index_0 + {{ q * lanes }}u, n - 1u);
    let inside_{{ q }} = index_0 + {{ q * lanes }}u < n; // in place, the last must not be done again
{% endif %}
    let at_{{ q }} = index_{{ q }} / row_quads * 2u * row_quads + index_{{ q }} % row_quads;
    let gate_{{ q }} = {{ gate_scale }}vec4<f32>({{ source }}[at_{{ q }}]);
    let up_{{ q }} = vec4<f32>({{ source }}[at_{{ q }} + row_quads]);
{% if splits == 1 %}
    let d_{{ q }} = vec4<f32>(d_y[index_{{ q }}]){{ gated_scale }};
{% else %}
    let d_{{ q }} = vec4<f32>({{ stored(added("partial", "index_%d" % q, 0, splits, maximum_rows * width // 4), d_y_type) }}){{ gated_scale }};
{% endif %}
{% endfor %}
{% for q in range(quads) %}
    {{ "if (inside_%d) " % q if q > 0 }}{
        d_gate_up[at_{{ q }}] = {{ stored("%sd_%d * up_%d * gate_slope(gate_%d)" % (gate_scale, q, q, q), out_type) }};
        d_gate_up[at_{{ q }} + row_quads] = {{ stored("d_%d * gate_value(gate_%d)" % (q, q), out_type) }};
{% if gated_type %}
        gated[index_{{ q }}] = {{ stored("gate_value(gate_%d) * up_%d%s" % (q, q, gated_scale), gated_type) }};
{% endif %}
    }
{% endfor %}
}
