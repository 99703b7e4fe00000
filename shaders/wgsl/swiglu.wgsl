// y[m, i] = activation(gate[m, i]) · up[m, i];  gate_up [rows, 2n] of {{ x_type }} holds the gate
// first; y [rows, n] of {{ out_type }}.
{% if gate_power != 1 or gated_power != 1 %}
// Both are stored as other multiples: y = {{ gated_power }} · activation({{ gate_power }} · gate) · up.
{% endif %}
// One lane {{ quads }} times four columns, {{ lanes }} times four apart.
{% if splits > 1 %}
// gate_up is written here: Σ_s partial[s, m, i], in the order of matmul_reduce.wgsl, of the partial sums
// [{{ splits }}, maximum rows, 2n] that a product leaves.
{% endif %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
{% if splits == 1 %}
@group(0) @binding(1) var<storage, read> gate_up: array<vec4<{{ x_type }}>>;
{% else %}
@group(0) @binding(1) var<storage, read> partial: array<vec4<f32>>;
{% endif %}
@group(0) @binding(2) var<storage, read_write> y: array<vec4<{{ out_type }}>>;
{% if splits > 1 %}
@group(0) @binding(3) var<storage, read_write> gate_up: array<vec4<{{ x_type }}>>;
{% endif %}

const row_quads = {{ width // 4 }}u; // of y

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
{% endif %}
    let at_{{ q }} = index_{{ q }} / row_quads * 2u * row_quads + index_{{ q }} % row_quads;
{% if splits == 1 %}
    let gate_{{ q }} = {{ gate_scale }}vec4<f32>(gate_up[at_{{ q }}]);
    let up_{{ q }} = vec4<f32>(gate_up[at_{{ q }} + row_quads]);
{% else %}
    let stored_gate_{{ q }} = {{ stored(added("partial", "at_%d" % q, 0, splits, maximum_rows * width // 2), x_type) }};
    let stored_up_{{ q }} = {{ stored(added("partial", "at_%d + row_quads" % q, 0, splits, maximum_rows * width // 2), x_type) }};
    let gate_{{ q }} = {{ gate_scale }}vec4<f32>(stored_gate_{{ q }});
    let up_{{ q }} = vec4<f32>(stored_up_{{ q }});
{% endif %}
{% endfor %}
{% for q in range(quads) %}
    {{ "if (index_0 + %du < n) " % (q * lanes) if q > 0 }}{
        y[index_{{ q }}] = {{ stored("gate_value(gate_%d) * up_%d%s" % (q, q, gated_scale), out_type) }};
{% if splits > 1 %}
        gate_up[at_{{ q }}] = stored_gate_{{ q }};
        gate_up[at_{{ q }} + row_quads] = stored_up_{{ q }};
{% endif %}
    }
{% endfor %}
}
