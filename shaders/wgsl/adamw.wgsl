// AdamW with decoupled decay (Loshchilov & Hutter 2019), as torch.optim.AdamW:
//   g = gradient · factor;   p ← p · (1 − lr · decay)
//   m ← β1 m + (1 − β1) g;   v ← β2 v + (1 − β2) g²
//   p ← p − lr / (1 − β1ᵗ) · m / (sqrt(v / (1 − β2ᵗ)) + ε)
// Nothing changes where a step does not count (state[2] = 0). What would be too large for an f32 is its
// largest: no rate makes a parameter infinite. One lane four elements.
//
// Bindings: step (learning rate, 1 − β1ᵗ, 1 − β2ᵗ), state [4] of gradient_norm; parameters,
// gradient, m, v [n]{% if rates %}, rates [n / 64], what lr of each 64 elements is multiplied by{% endif %}.

{% include "parts/within_f32.wgsl" %}

struct Step { learning_rate: f32, correction_1: f32, correction_2: f32 }

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> state: array<f32>;
@group(0) @binding(2) var<storage, read_write> parameters: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> gradient: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> first_moment: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> second_moment: array<vec4<f32>>;
{% if rates %}
@group(0) @binding(6) var<storage, read> rates: array<f32>;
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
    let m = {{ beta1 }} * first_moment[i] + {{ 1.0 - beta1 }} * g;
    let v = {{ beta2 }} * second_moment[i] + {{ 1.0 - beta2 }} * g * g;
    first_moment[i] = m;
    second_moment[i] = v;
    let p = parameters[i] * max(1.0 - learning_rate * {{ weight_decay }}, -LARGEST);
    let denominator = sqrt(v / step.correction_2) + {{ epsilon }};
    let rate = min(learning_rate / step.correction_1, LARGEST);
    parameters[i] = within(p - rate * m / denominator);
}
