// Whether a step counts: state[2] = 1 where the sum of losses and the gradient's norm are finite and
// fewer than {{ most_in_a_row }} steps before it in a row weren't, else 0; and the counts that follow.
{% if scaling %}
// The loss was scaled: norm and factor become those of the true gradient. The scale halves where a
// step is skipped for its loss, and doubles after {{ scaling.growth_interval }} that count. Where the loss is finite and the norm is not
// the step's k-th try, from 0, makes it 2^(2^k) times smaller, and all is held until the host runs that step again;
// one that no scale helps is skipped, too, and leaves the scale as it found it.
{% endif %}
// Bindings: metrics [128], the sum of losses first; from {{ state }} on state = (norm, factor, finite, 0,
// scale, good steps, skipped in a row, skipped in all, overflows in a row). One lane.
{% if scaling %}
// These are the step's tries that overflowed; behind them: whether all is held, the scale of its first try.
{% endif %}

@group(0) @binding(0) var<storage, read_write> metrics: array<f32>;

// By the exponent's bits: a WGSL compiler may assume that no NaN occurs.
fn is_finite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }

@compute @workgroup_size(1)
fn main() {
    let halted = metrics[{{ state + 6 }}] >= {{ most_in_a_row }}.0{% if scaling %} || metrics[{{ state + 9 }}] != 0.0{% endif %};
    let counts = !halted && metrics[{{ state + 2 }}] != 0.0 && is_finite(metrics[0]);
{% if scaling %}
    let scale = metrics[{{ state + 4 }}];
    // 1 / scale exactly, which a division need not be: the exponent of a power of two is turned over.
    let inverse = bitcast<f32>(0x7f000000u - bitcast<u32>(scale));
    let norm = metrics[{{ state }}] * inverse;
    metrics[{{ state }}] = norm;
{% if max_norm is none %}
    metrics[{{ state + 1 }}] = inverse;
{% else %}
    metrics[{{ state + 1 }}] = min(1.0, {{ max_norm }} / (norm + 1e-6)) * inverse;
{% endif %}
{% endif %}
    metrics[{{ state + 2 }}] = select(0.0, 1.0, counts);
    if (counts) {
        let good = metrics[{{ state + 5 }}] + 1.0;
        metrics[{{ state + 6 }}] = 0.0;
{% if scaling %}
        metrics[{{ state + 8 }}] = 0.0;
        if (good >= {{ scaling.growth_interval }}.0) {
            metrics[{{ state + 4 }}] = min(2.0 * scale, {{ scaling.most }});
            metrics[{{ state + 5 }}] = 0.0;
        } else {
            metrics[{{ state + 5 }}] = good;
        }
{% else %}
        metrics[{{ state + 5 }}] = good;
{% endif %}
    } else if (!halted) {
{% if scaling %}
        let tries = u32(metrics[{{ state + 8 }}]);
        if (is_finite(metrics[0]) && scale > {{ scaling.least }}) {
            let fall = bitcast<f32>((127u - (1u << min(tries, 6u))) << 23u);
            metrics[{{ state + 4 }}] = max(fall * scale, {{ scaling.least }});
            metrics[{{ state + 8 }}] = f32(tries + 1u);
            metrics[{{ state + 9 }}] = 1.0;
        } else {
            metrics[{{ state + 4 }}] = select(max(0.5 * scale, {{ scaling.least }}), metrics[{{ state + 10 }}], tries > 0u);
            metrics[{{ state + 6 }}] += 1.0;
            metrics[{{ state + 7 }}] += 1.0;
            metrics[{{ state + 8 }}] = 0.0;
        }
        metrics[{{ state + 5 }}] = 0.0;
{% else %}
        metrics[{{ state + 6 }}] += 1.0;
        metrics[{{ state + 5 }}] = 0.0;
        metrics[{{ state + 7 }}] += 1.0;
{% endif %}
    }
}
