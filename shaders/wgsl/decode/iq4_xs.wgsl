// IQ4_XS: w = d · (s - 32) · level(q), super-blocks of 256 with eight six-bit scales s. A row is its
// quants (a word an eight: weight j in the lower nibble of byte j, weight 4 + j in the upper), then
// two words a super-block: d (f16) below the upper two bits of each s, and the lower four.
{% include "decode/iq4_values.wgsl" %}

fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let at = base + columns / 8u + k / 256u * 2u;
    let sub = (k / 32u) & 7u;
    let first = weights[at];
    let s = (extractBits(first, 16u + 2u * sub, 2u) << 4u) | extractBits(weights[at + 1u], 4u * sub, 4u);
    let d = unpack2x16float(first).x * (f32(s) - 32.0);
    let q = vec4(weights[base + k / 8u]);
    return Eight(
        iq4_values((q >> vec4(0u, 8u, 16u, 24u)) & vec4(15u)) * d,
        iq4_values((q >> vec4(4u, 12u, 20u, 28u)) & vec4(15u)) * d,
    );
}
