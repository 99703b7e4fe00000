// Q4_1: w = d · q + m, blocks of 32. A row is its quants (a word an eight: weight j in the lower
// nibble of byte j, weight 4 + j in the upper), then one word (d, m as f16) a block.
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let scales = unpack2x16float(weights[base + columns / 8u + k / 32u]);
    let q = vec4(weights[base + k / 8u]);
    return Eight(
        vec4<f32>((q >> vec4(0u, 8u, 16u, 24u)) & vec4(15u)) * scales.x + scales.y,
        vec4<f32>((q >> vec4(4u, 12u, 20u, 28u)) & vec4(15u)) * scales.x + scales.y,
    );
}
