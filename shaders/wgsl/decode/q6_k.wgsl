// Q6_K: w = d · s · (q - 32), super-blocks of 256 with a signed byte s for every 16 weights. A row is
// the lower four bits of its quants (a word an eight: weight j in the lower nibble of byte j, weight
// 4 + j in the upper), then their upper two (a word two eights: the eight e has weight j in bits 4e …
// of byte j, weight 4 + j in bits 4e + 2 …), then the s (bytes), then the d (f16, two a word).
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let half = weights[base + columns / 64u * 13u + k / 512u] >> ((k / 16u) & 16u);
    let s = extractBits(bitcast<i32>(weights[base + columns / 16u * 3u + k / 64u]), (k / 2u) & 24u, 8u);
    let d = unpack2x16float(half).x * f32(s);
    let q = weights[base + k / 8u];
    let upper = weights[base + columns / 8u + k / 16u] >> ((k / 2u) & 4u);
    let a = (q & 0x0f0f0f0fu) | ((upper & 0x03030303u) << 4u);
    let b = ((q >> 4u) & 0x0f0f0f0fu) | ((upper & 0x0c0c0c0cu) << 2u);
    return Eight(
        (vec4<f32>(unpack4xU8(a)) - 32.0) * d,
        (vec4<f32>(unpack4xU8(b)) - 32.0) * d,
    );
}
