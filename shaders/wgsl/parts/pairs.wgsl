{#
Numbers of f32 as pairs of f16: the number rounded to f16, and what that leaves (Ootomo and Yokota 2022, "Recovering single
precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance"). What is paired has been
scaled by a power of two that brings the largest number of its row or column to 2^14 … 2^15, of f16's 65,504. So, unlike
there, what is left needs no scale of its own, and all products one sum: it is off by 2^-25 at most, f16's least being
2^-24, and so by 2^-39 of the largest number.
#}
{% from "parts/unpacked.wgsl" import unpacking %}
{% macro packing() %}
// Four numbers as two words of f16.
fn packed(numbers: vec4<f32>) -> vec2<u32> {
    return vec2(pack2x16float(numbers.xy), pack2x16float(numbers.zw));
}
{% endmacro %}

{% macro scaling() %}
struct Pair { upper: vec4<u32>, lower: vec4<u32> }

// The power of two for what has these bits as its largest number's: zeros and numbers below 2^-112
// take the largest, infinite ones and NaN what is right for the numbers beside them.
fn exponent_for(largest: u32) -> i32 { return clamp(141 - i32(largest >> 23u), -126, 126); }

fn power(exponent: i32) -> f32 { return bitcast<f32>(u32(exponent + 127) << 23u); }
{% endmacro %}

{% macro pairing() %}
{{ unpacking() }}

// What f16 leaves of four numbers; nothing of those that are not finite.
fn lower(numbers: vec4<f32>, upper: vec2<u32>) -> vec2<u32> {
    let rest = numbers - unpacked(upper);
    return packed(select(vec4<f32>(), rest, abs(rest) < vec4(65504.0)));
}

fn pair(a: vec4<f32>, b: vec4<f32>) -> Pair {
    let first = packed(a);
    let second = packed(b);
    return Pair(vec4(first, second), vec4(lower(a, first), lower(b, second)));
}
{% endmacro %}
