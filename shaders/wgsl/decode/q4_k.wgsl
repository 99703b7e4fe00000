// Q4_K: w = d · s · q - dmin · m, super-blocks of 256 with six-bit s and m for every 32 weights. A row
// is its quants (a word an eight: weight j in the lower nibble of byte j, weight 4 + j in the upper),
// then five words a super-block: d and dmin (f16), then s and m in turn (bytes).
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let at = base + columns / 8u + k / 256u * 5u;
    let scales = unpack2x16float(weights[at]);
    let s = weights[at + 1u + ((k / 64u) & 3u)] >> ((k / 2u) & 16u);
    let d = scales.x * f32(s & 63u);
    let m = scales.y * f32((s >> 8u) & 63u);
    let q = vec4(weights[base + k / 8u]);
    return Eight(
        vec4<f32>((q >> vec4(0u, 8u, 16u, 24u)) & vec4(15u)) * d - m,
        vec4<f32>((q >> vec4(4u, 12u, 20u, 28u)) & vec4(15u)) * d - m,
    );
}
