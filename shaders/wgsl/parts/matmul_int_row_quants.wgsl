{# How a block of 32 weights of a row lies (decode/<type>.wgsl) and becomes bytes: macros over the names of variables.
   `row` is where the row begins and `b` the block's number; bits and offsets count words and quads of words. #}
{% set four_bits = quantization in ("q4_0", "q4_1", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k") %}
{% set five_bits = quantization in ("q5_0", "q5_1", "q5_k") %}
{% set halved = quantization == "q6_k" %}{# a scale for each 16 weights #}
{% set zero = {"q4_0": 8, "q5_0": 16, "q6_k": 32}.get(quantization, 0) %}
{% set minimum = quantization in ("q4_1", "q5_1", "q4_k", "q5_k") %}
{# In words: where the row's other sections begin. #}
{% set fifths_at = contraction // 8 %}
{% set scales_at = {
    "q8_0": contraction // 4, "q4_0": contraction // 8, "q4_1": contraction // 8, "q4_k": contraction // 8,
    "q5_0": contraction // 32 * 5, "q5_1": contraction // 32 * 5, "q5_k": contraction // 32 * 5,
    "q6_k": contraction // 16 * 3,
}[quantization] %}
fn word_of(row: u32, at: u32) -> u32 {
    return weights[row + at / 4u][at & 3u];
}

// The scale of a block, or of its two halves{% if minimum %}; y: what the minimum is to be added as{% endif %}.
fn scale_of(row: u32, b: u32) -> vec2<f32> {
{% if quantization in ("q4_0", "q5_0", "q8_0") %}
    let d = unpack2x16float(word_of(row, {{ scales_at }}u + b / 2u) >> ((b & 1u) * 16u)).x;
    return vec2(d, d);
{% elif quantization in ("q4_1", "q5_1") %}
    return unpack2x16float(word_of(row, {{ scales_at }}u + b));
{% elif quantization in ("q4_k", "q5_k") %}
    let at = {{ scales_at }}u + b / 8u * 5u;
    let s = word_of(row, at + 1u + ((b / 2u) & 3u)) >> ((b & 1u) * 16u);
    return unpack2x16float(word_of(row, at)) * vec2(f32(s & 63u), -f32((s >> 8u) & 63u));
{% elif quantization == "q6_k" %}
    let d = unpack2x16float(word_of(row, {{ contraction // 64 * 13 }}u + b / 16u) >> ((b & 8u) * 2u)).x;
    let s = bitcast<i32>(word_of(row, {{ scales_at }}u + b / 2u));
    let shift = (b & 1u) * 16u;
    return d * vec2(f32(extractBits(s, shift, 8u)), f32(extractBits(s, shift + 8u, 8u)));
{% endif %}
}

{% macro load_block(name, row, b) %}
{% if four_bits %}
        let {{ name }}_q = weights[{{ row }} + {{ b }}];
{% if five_bits %}
        let {{ name }}_fifth = word_of({{ row }}, {{ fifths_at }}u + {{ b }});
{% elif quantization == "q6_k" %}
        let {{ name }}_upper_0 = word_of({{ row }}, {{ contraction // 8 }}u + 2u * ({{ b }}));
        let {{ name }}_upper_1 = word_of({{ row }}, {{ contraction // 8 }}u + 2u * ({{ b }}) + 1u);
{% endif %}
{% else %}
        let {{ name }}_q0 = weights[{{ row }} + 2u * ({{ b }})];
        let {{ name }}_q1 = weights[{{ row }} + 2u * ({{ b }}) + 1u];
{% endif %}
        let {{ name }}_scale = scale_of({{ row }}, {{ b }});
{% endmacro %}

{# Eight weights e (0 … 3) of a loaded block as bytes: `to`_a those of the first four, `to`_b of the others. #}
{% macro unpack_eight(name, e, to) %}
{% if quantization == "q8_0" %}
            let {{ to }}_a = {{ name }}_q{{ e // 2 }}[{{ 2 * (e % 2) }}];
            let {{ to }}_b = {{ name }}_q{{ e // 2 }}[{{ 2 * (e % 2) + 1 }}];
{% elif five_bits %}
            let {{ to }}_a = ({{ name }}_q[{{ e }}] & 0x0f0f0f0fu) | ((({{ name }}_fifth >> {{ 2 * e }}u) & 0x01010101u) << 4u);
            let {{ to }}_b = (({{ name }}_q[{{ e }}] >> 4u) & 0x0f0f0f0fu) | ((({{ name }}_fifth >> {{ 2 * e + 1 }}u) & 0x01010101u) << 4u);
{% elif quantization == "q6_k" %}
            let {{ to }}_u = {{ name }}_upper_{{ e // 2 }} >> {{ 4 * (e % 2) }}u;
            let {{ to }}_a = ({{ name }}_q[{{ e }}] & 0x0f0f0f0fu) | (({{ to }}_u & 0x03030303u) << 4u);
            let {{ to }}_b = (({{ name }}_q[{{ e }}] >> 4u) & 0x0f0f0f0fu) | (({{ to }}_u & 0x0c0c0c0cu) << 2u);
{% else %}
            let {{ to }}_a = {{ name }}_q[{{ e }}] & 0x0f0f0f0fu;
            let {{ to }}_b = ({{ name }}_q[{{ e }}] >> 4u) & 0x0f0f0f0fu;
{% endif %}
{% endmacro %}
