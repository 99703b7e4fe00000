// Q2_K: w = d · s · q - dmin · m, super-blocks of 256 with four-bit s and m for every 16 weights. A
// row is its quants (a word two eights: the eight e has weight j in bits 4e … of byte j, weight 4 + j
// in bits 4e + 2 …), then five words a super-block: d and dmin (f16), then bytes with s in the lower
// nibble and m in the upper.
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let at = base + columns / 16u + k / 256u * 5u;
    let scales = unpack2x16float(weights[at]);
    let s = weights[at + 1u + ((k / 64u) & 3u)] >> ((k / 2u) & 24u);
    let d = scales.x * f32(s & 15u);
    let m = scales.y * f32((s >> 4u) & 15u);
    let q = vec4(weights[base + k / 16u] >> ((k / 2u) & 4u));
    return Eight(
        vec4<f32>((q >> vec4(0u, 8u, 16u, 24u)) & vec4(3u)) * d - m,
        vec4<f32>((q >> vec4(2u, 10u, 18u, 26u)) & vec4(3u)) * d - m,
    );
}
