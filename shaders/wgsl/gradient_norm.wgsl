{% set inverse_scale = 1.0 / loss_scale %}
// norm = sqrt(Σ partial) / {{ loss_scale }}: the gradients in the buffer are so many times too large;
// factor = min(1, max_norm / (norm + 1e-6)) / {{ loss_scale }}, but for that as torch's clip_grad_norm_;
// finite = 0 where the norm is NaN or infinite. state = (norm, factor, finite, 0).
// Bindings: partial [n_partials], state [4]. One workgroup.

@group(0) @binding(0) var<storage, read> partial: array<f32>;
@group(0) @binding(1) var<storage, read_write> state: array<f32>;

{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(@builtin(local_invocation_index) lane: u32) {
    var sum = 0.0;
    for (var i = lane; i < {{ n_partials }}u; i += {{ lanes }}u) { sum += partial[i]; }
    let squares = row_sum(sum, lane);
    if (lane == 0u) {
        // By the exponent's bits: a WGSL compiler may assume that no NaN occurs.
        let finite = (bitcast<u32>(squares) & 0x7f800000u) != 0x7f800000u;
        let norm = {{ inverse_scale }} * sqrt(squares);
        state[0] = norm;
{% if max_norm is none %}
        state[1] = {{ inverse_scale }};
{% else %}
        state[1] = {{ inverse_scale }} * min(1.0, {{ max_norm }} / (norm + 1e-6));
{% endif %}
        state[2] = select(0.0, 1.0, finite);
        state[3] = 0.0;
    }
}
