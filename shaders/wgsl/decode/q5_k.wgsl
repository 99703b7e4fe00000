// Q5_K: w = d · s · q - dmin · m, super-blocks of 256 with six-bit s and m for every 32 weights. A row
// is the lower four bits of its quants (a word an eight: weight j in the lower nibble of byte j,
// weight 4 + j in the upper), then their fifth bits (a word four eights: the eight e has weight j in
// bit 2e of byte j, weight 4 + j in bit 2e + 1), then five words a super-block: d and dmin (f16), then
// s and m in turn (bytes).
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let at = base + columns / 32u * 5u + k / 256u * 5u;
    let scales = unpack2x16float(weights[at]);
    let s = weights[at + 1u + ((k / 64u) & 3u)] >> ((k / 2u) & 16u);
    let d = scales.x * f32(s & 63u);
    let m = scales.y * f32((s >> 8u) & 63u);
    let q = weights[base + k / 8u];
    let fifth = weights[base + columns / 8u + k / 32u] >> ((k / 4u) & 6u);
    let a = (q & 0x0f0f0f0fu) | ((fifth & 0x01010101u) << 4u);
    let b = ((q >> 4u) & 0x0f0f0f0fu) | ((fifth & 0x02020202u) << 3u);
    return Eight(vec4<f32>(unpack4xU8(a)) * d - m, vec4<f32>(unpack4xU8(b)) * d - m);
}
