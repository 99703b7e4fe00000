// IQ4_NL: w = d · level(q), blocks of 32. A row is its quants (a word an eight: weight j in the lower
// nibble of byte j, weight 4 + j in the upper), then its scales (f16, two a word).
{% include "decode/iq4_values.wgsl" %}

fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let d = unpack2x16float(weights[base + columns / 8u + k / 64u] >> ((k / 2u) & 16u)).x;
    let q = vec4(weights[base + k / 8u]);
    return Eight(
        iq4_values((q >> vec4(0u, 8u, 16u, 24u)) & vec4(15u)) * d,
        iq4_values((q >> vec4(4u, 12u, 20u, 28u)) & vec4(15u)) * d,
    );
}
