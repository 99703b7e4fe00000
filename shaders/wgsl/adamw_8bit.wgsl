// AdamW with moments of 8 bits a number (Dettmers et al. 2022, "8-bit Optimizers via Block-wise
// Quantization"), as bitsandbytes' AdamW8bit: a moment is its code's value times the scale of its block of 256.
//   g = gradient · factor;   m ← β1 m + (1 − β1) g;   v ← β2 v + (1 − β2) g²
//   p ← p · (1 − lr · decay) − lr · c / (1 − β1ᵗ) · m / (sqrt(v) + c · ε),   c = sqrt(1 − β2ᵗ)
// and each block of m and v is stored with its largest size as its scale, each number as the code
// nearest to it; a number of m below zero never as zero. Nor is one of v above zero, where bitsandbytes
// may: the next step would divide by ε alone.
// Nothing changes where a step does not count (state[2] = 0). One lane four elements; 64 lanes a block, {{ lanes // 64 }} of which
// a workgroup has, since each reads all codes first.
//
// Bindings: step (learning rate, 1 − β1ᵗ, 1 − β2ᵗ), state [4] of gradient_norm; parameters, gradient [n];
// m, v of four codes a word [n / 4]; scales [⌈n / 256⌉, 2] of m and v; codes [512], values of m's codes and
// of v's, each ascending{% if rates %}; rates [n / 64], what lr of each 64 elements is multiplied by{% endif %}.

{% set sum_lanes = 64 %}
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

// Places of the values next below four numbers of m, and of v, among the codes of each, by halves: the
// next read waits for the one before, so all eight numbers are looked for at once.
struct Places { m: vec4<u32>, v: vec4<u32> }

fn read_values(at: vec4<u32>) -> vec4<f32> {
    return vec4(values[at.x], values[at.y], values[at.z], values[at.w]);
}

fn not_above(m: vec4<f32>, v: vec4<f32>) -> Places {
    var found = Places(vec4(0u), vec4(256u)); // the last codes whose values are not above
{% for step in (128, 64, 32, 16, 8, 4, 2, 1) %}
    {
        let of_m = read_values(found.m + {{ step }}u);
        let of_v = read_values(found.v + {{ step }}u);
        found.m = select(found.m, found.m + {{ step }}u, of_m <= m);
        found.v = select(found.v, found.v + {{ step }}u, of_v <= v);
    }
{% endfor %}
    return found;
}

// Which of these values and the next ones are nearest.
fn nearest(value: vec4<f32>, low: vec4<u32>, last: u32) -> vec4<u32> {
    let next = min(low + 1u, vec4(last));
    return select(low, next, value - read_values(low) > read_values(next) - value);
}

fn word(codes: vec4<u32>) -> u32 {
    return codes.x | (codes.y << 8u) | (codes.z << 16u) | (codes.w << 24u);
}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let i = (group.x + group.y * groups.x) * {{ lanes }}u + lane;
    let block = i / 64u;
    let inside = i < {{ n // 4 }}u;
    for (var at = lane; at < 512u; at += {{ lanes }}u) { values[at] = codes[at]; }
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
    let places = not_above(m * inverse.x, v * inverse.y);
    var code_m = nearest(m * inverse.x, places.m, 255u);
    code_m = select(code_m, code_m - 1u, (m < vec4(0.0)) & (read_values(code_m) >= vec4(0.0)));
    let code_v = nearest(v * inverse.y, places.v, 511u) - 256u;
    first_moment[i] = word(code_m);
    second_moment[i] = word(select(code_v, max(code_v, vec4(1u)), v > vec4(0.0)));
    if (lane % 64u == 0u) { scales[block] = top; }
}
