{#
Four f16 as f32, by their bits: drivers take what is packed and unpacked again for the number before (Mesa 25.0's software
driver, NVIDIA's 580.159), though it was rounded.
#}
{% macro unpacking() %}
fn unpacked(words: vec2<u32>) -> vec4<f32> {
    let halves = vec4(words.x & 0xffffu, words.x >> 16u, words.y & 0xffffu, words.y >> 16u);
    let size = (halves & vec4(0x7fffu)) << vec4(13u);
    let normal = bitcast<vec4<f32>>(size + vec4(112u << 23u));
    let small = bitcast<vec4<f32>>(size + vec4(113u << 23u)) - vec4(0.00006103515625);
    let number = select(normal, small, size < vec4(1u << 23u));
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(number) | ((halves & vec4(0x8000u)) << vec4(16u)));
}

// What f16 keeps of four numbers; what it doesn't hold stays as it is.
fn rounded(four: vec4<f32>) -> vec4<f32> {
    let kept = unpacked(vec2(pack2x16float(four.xy), pack2x16float(four.zw)));
    return select(four, kept, abs(four) < vec4(65520.0));
}
{% endmacro %}
