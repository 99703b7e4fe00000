// Q5_0: w = d · (q - 16), blocks of 32. A row is the lower four bits of its quants (a word an eight:
// weight j in the lower nibble of byte j, weight 4 + j in the upper), then their fifth bits (a word
// a block: the eight e has weight j in bit 2e of byte j, weight 4 + j in bit 2e + 1), then its
// scales (f16, two a word).
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let d = unpack2x16float(weights[base + columns / 32u * 5u + k / 64u] >> ((k / 2u) & 16u)).x;
    let q = weights[base + k / 8u];
    let fifth = weights[base + columns / 8u + k / 32u] >> ((k / 4u) & 6u);
    let a = (q & 0x0f0f0f0fu) | ((fifth & 0x01010101u) << 4u);
    let b = ((q >> 4u) & 0x0f0f0f0fu) | ((fifth & 0x02020202u) << 3u);
    return Eight(
        (vec4<f32>(unpack4xU8(a)) - 16.0) * d,
        (vec4<f32>(unpack4xU8(b)) - 16.0) * d,
    );
}
