// Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"), as bitsandbytes' and torch's:
//   g = gradient · factor;   p ← p · (1 − lr · decay)
//   p ← p − lr · sign(β1 m + (1 − β1) g);   m ← β2 m + (1 − β2) g
// Nothing changes where a step does not count (state[2] = 0). One lane four elements.
//
// Bindings: step (learning rate, …), state [4] of gradient_norm; parameters, gradient, m [n]{% if rates %}, rates
// [n / 64], what lr of each 64 elements is multiplied by{% endif %}.

{% include "parts/within_f32.wgsl" %}

struct Step { learning_rate: f32, correction_1: f32, correction_2: f32 }

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> state: array<f32>;
@group(0) @binding(2) var<storage, read_write> parameters: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> gradient: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> first_moment: array<vec4<f32>>;
{% if rates %}
@group(0) @binding(5) var<storage, read> rates: array<f32>;
{% endif %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.x + group.y * groups.x) * {{ lanes }}u + lane;
    if (i >= {{ n // 4 }}u || state[2] == 0.0) { return; }
    let learning_rate = {{ "min(step.learning_rate * rates[i / 16u], LARGEST)" if rates else "step.learning_rate" }};
    let g = gradient[i] * state[1];
    let m = first_moment[i];
    let p = parameters[i] * max(1.0 - learning_rate * {{ weight_decay }}, -LARGEST);
    parameters[i] = within(p - learning_rate * sign({{ beta1 }} * m + {{ 1.0 - beta1 }} * g));
    first_moment[i] = {{ beta2 }} * m + {{ 1.0 - beta2 }} * g;
}
