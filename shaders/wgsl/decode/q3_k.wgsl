// Q3_K: w = d · (s - 32) · (q - 4), super-blocks of 256 with a six-bit s for every 16 weights. A row is
// the lower two bits of its quants (a word two eights: the eight e has weight j in bits 4e … of byte
// j, weight 4 + j in bits 4e + 2 …), then their third bits (a word four eights: weight j in bit 2e of
// byte j, weight 4 + j in bit 2e + 1), then the s (bytes), then the d (f16, two a word).
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let half = weights[base + columns / 64u * 7u + k / 512u] >> ((k / 16u) & 16u);
    let s = weights[base + columns / 32u * 3u + k / 64u] >> ((k / 2u) & 24u);
    let d = unpack2x16float(half).x * (f32(s & 63u) - 32.0);
    let q = weights[base + k / 16u] >> ((k / 2u) & 4u);
    let third = weights[base + columns / 16u + k / 32u] >> ((k / 4u) & 6u);
    let a = (q & 0x03030303u) | ((third & 0x01010101u) << 2u);
    let b = ((q >> 2u) & 0x03030303u) | ((third & 0x02020202u) << 1u);
    return Eight(
        (vec4<f32>(unpack4xU8(a)) - 4.0) * d,
        (vec4<f32>(unpack4xU8(b)) - 4.0) * d,
    );
}
