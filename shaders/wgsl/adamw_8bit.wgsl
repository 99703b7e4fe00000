// AdamW with moments of 8 bits a number (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
// Quantization"), as bitsandbytes' AdamW8bit: a moment is its code's value times the scale of its block of 256.
//   g = gradient · factor;   m ← β1 m + (1 − β1) g;   v ← β2 v + (1 − β2) g²
//   p ← p · (1 − lr · decay) − lr · c / (1 − β1ᵗ) · m / (sqrt(v) + c · ε),   c = sqrt(1 − β2ᵗ)
// and each block of m and v is stored with its largest size as its scale, each number as the code
// nearest to it; a number of m below zero never as zero. Nor is one of v above zero, where bitsandbytes
// may: the next step would divide by ε alone.
// Nothing changes where a step does not count (state[2] = 0). One workgroup a block, one lane four elements.
//
// Bindings: step (learning rate, 1 − β1ᵗ, 1 − β2ᵗ), state [4] of gradient_norm; parameters, gradient [n];
// m, v of four codes a word [n / 4]; scales [⌈n / 256⌉, 2] of m and v; codes [512], values of m's codes and
// of v's, each ascending{% if rates %}; rates [n / 64], what lr of each 64 elements is multiplied by{% endif %}.

{% set lanes = 64 %}
{% include "parts/within_f32.wgsl" %}

struct Step { learning_rate: f32, correction_1: f32, correction_2: f32 }

@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> state: array<f32>;
@group(0) @binding(2) var<storage, read_write> parameters: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> gradient: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> first_moment: array<u32>;
@group(0) @binding(5) var<storage, read_write> second_moment: array<u32>;
@group(0) @binding(6) var<storage, read_write> scales: array<vec2<f32>>;
@group(0) @binding(7) var<storage, read> codes: array<f32>;
{% if rates %}
@group(0) @binding(8) var<storage, read> rates: array<f32>;
{% endif %}

{% set reduction = "max" %}
{% set sum_type = "vec2<f32>" %}
{% include "parts/row_sum.wgsl" %}

var<workgroup> values: array<f32, 512>; // codes

fn decoded(word: u32, table: u32) -> vec4<f32> {
    return vec4(
        values[table + (word & 0xffu)], values[table + ((word >> 8u) & 0xffu)],
        values[table + ((word >> 16u) & 0xffu)], values[table + (word >> 24u)],
    );
}

// The code whose value is nearest.
fn nearest(value: f32, table: u32) -> u32 {
    var low = 0u; // the last code whose value is not above
    for (var step = 128u; step > 0u; step /= 2u) {
        if (values[table + low + step] <= value) { low += step; }
    }
    let next = min(low + 1u, 255u);
    let closer = value - values[table + low] > values[table + next] - value;
    return select(low, next, closer);
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block = group.x + group.y * groups.x;
    let i = block * 64u + lane;
    let inside = i < {{ n // 4 }}u;
    for (var at = lane; at < 512u; at += 64u) { values[at] = codes[at]; }
    workgroupBarrier();
    var m = vec4<f32>();
    var v = vec4<f32>();
    if (inside) {
        let scale = scales[block];
        let g = gradient[i] * state[1];
        m = {{ beta1 }} * (decoded(first_moment[i], 0u) * scale.x) + {{ 1.0 - beta1 }} * g;
        v = {{ beta2 }} * (decoded(second_moment[i], 256u) * scale.y) + {{ 1.0 - beta2 }} * g * g;
    }
    let sizes = abs(m);
    let highest = vec2(
        max(max(sizes.x, sizes.y), max(sizes.z, sizes.w)), max(max(v.x, v.y), max(v.z, v.w)),
    );
    let top = row_max(highest, lane);
    if (!inside || state[2] == 0.0) { return; }
    let learning_rate = {{ "min(step.learning_rate * rates[i / 16u], LARGEST)" if rates else "step.learning_rate" }};
    let c = sqrt(step.correction_2);
    let rate = min(learning_rate * c / step.correction_1, LARGEST);
    let p = parameters[i] * max(1.0 - learning_rate * {{ weight_decay }}, -LARGEST);
    parameters[i] = within(p - rate * m / (sqrt(v) + c * {{ epsilon }}));
    let inverse = select(vec2(0.0), 1.0 / top, top > vec2(0.0));
    var word_m = 0u;
    var word_v = 0u;
    for (var k = 0u; k < 4u; k += 1u) {
        var code = nearest(m[k] * inverse.x, 0u);
        if (m[k] < 0.0 && values[code] >= 0.0) { code -= 1u; }
        word_m |= code << (8u * k);
        let code_v = nearest(v[k] * inverse.y, 256u);
        word_v |= select(code_v, max(code_v, 1u), v[k] > 0.0) << (8u * k);
    }
    first_moment[i] = word_m;
    second_moment[i] = word_v;
    if (lane == 0u) { scales[block] = top; }
}
