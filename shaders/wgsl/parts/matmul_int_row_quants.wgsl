{# How a block of 32 weights of a row lies (decode/<type>.wgsl) and becomes bytes: macros over the names of variables.
   `row` is where the row begins and `b` the block's number; bits and offsets count words and quads of words. #}
{# bits, zero, scales, group_size: the type's facts in forward/gguf/quantization.py. #}
{% set halved = group_size == 16 %}{# a scale for each 16 weights #}
{% set minimum = scales in ("halves", "six_bits") %}
{# In words: where the row's other sections begin. #}
{% set upper_at = contraction // 8 %}
{% set scales_at = contraction // 32 * bits %}
fn word_of(row: u32, at: u32) -> u32 {
    return weights[row + at / 4u][at & 3u];
}

// The scale of a block, or of its two halves{% if minimum %}; y: what the minimum is to be added as{% endif %}.
fn scale_of(row: u32, b: u32) -> vec2<f32> {
{% if scales == "half" %}
    let d = unpack2x16float(word_of(row, {{ scales_at }}u + b / 2u) >> ((b & 1u) * 16u)).x;
    return vec2(d, d);
{% elif scales == "halves" %}
    return unpack2x16float(word_of(row, {{ scales_at }}u + b));
{% elif scales == "six_bits" %}
    let at = {{ scales_at }}u + b / 8u * 5u;
    let s = word_of(row, at + 1u + ((b / 2u) & 3u)) >> ((b & 1u) * 16u);
    return unpack2x16float(word_of(row, at)) * vec2(f32(s & 63u), -f32((s >> 8u) & 63u));
{% elif scales == "bytes" %}
    let d = unpack2x16float(word_of(row, {{ scales_at + contraction // 64 }}u + b / 16u) >> ((b & 8u) * 2u)).x;
    let s = bitcast<i32>(word_of(row, {{ scales_at }}u + b / 2u));
    let shift = (b & 1u) * 16u;
    return d * vec2(f32(extractBits(s, shift, 8u)), f32(extractBits(s, shift + 8u, 8u)));
{% endif %}
}

{% macro load_block(name, row, b) %}
{% if bits < 8 %}
        let {{ name }}_q = weights[{{ row }} + {{ b }}];
{% if bits == 5 %}
        let {{ name }}_fifth = word_of({{ row }}, {{ upper_at }}u + {{ b }});
{% elif bits == 6 %}
        let {{ name }}_upper_0 = word_of({{ row }}, {{ upper_at }}u + 2u * ({{ b }}));
        let {{ name }}_upper_1 = word_of({{ row }}, {{ upper_at }}u + 2u * ({{ b }}) + 1u);
{% endif %}
{% else %}
        let {{ name }}_q0 = weights[{{ row }} + 2u * ({{ b }})];
        let {{ name }}_q1 = weights[{{ row }} + 2u * ({{ b }}) + 1u];
{% endif %}
        let {{ name }}_scale = scale_of({{ row }}, {{ b }});
{% endmacro %}

{# Eight weights e (0 … 3) of a loaded block as bytes: `to`_a those of the first four, `to`_b of the others. #}
{% macro unpack_eight(name, e, to) %}
{% if bits == 8 %}
            let {{ to }}_a = {{ name }}_q{{ e // 2 }}[{{ 2 * (e % 2) }}];
            let {{ to }}_b = {{ name }}_q{{ e // 2 }}[{{ 2 * (e % 2) + 1 }}];
{% elif bits == 5 %}
            let {{ to }}_a = ({{ name }}_q[{{ e }}] & 0x0f0f0f0fu) | ((({{ name }}_fifth >> {{ 2 * e }}u) & 0x01010101u) << 4u);
            let {{ to }}_b = (({{ name }}_q[{{ e }}] >> 4u) & 0x0f0f0f0fu) | ((({{ name }}_fifth >> {{ 2 * e + 1 }}u) & 0x01010101u) << 4u);
{% elif bits == 6 %}
            let {{ to }}_u = {{ name }}_upper_{{ e // 2 }} >> {{ 4 * (e % 2) }}u;
            let {{ to }}_a = ({{ name }}_q[{{ e }}] & 0x0f0f0f0fu) | (({{ to }}_u & 0x03030303u) << 4u);
            let {{ to }}_b = (({{ name }}_q[{{ e }}] >> 4u) & 0x0f0f0f0fu) | (({{ to }}_u & 0x0c0c0c0cu) << 2u);
{% else %}
            let {{ to }}_a = {{ name }}_q[{{ e }}] & 0x0f0f0f0fu;
            let {{ to }}_b = ({{ name }}_q[{{ e }}] >> 4u) & 0x0f0f0f0fu;
{% endif %}
{% endmacro %}
