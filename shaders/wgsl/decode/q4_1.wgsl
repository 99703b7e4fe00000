// Q4_1: w = d · q + m, blocks of 32. A row is its quants (4 words a block; a word holds eight
// consecutive weights, the first in the lowest nibble), then one word (d, m as f16) a block.
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let scales = unpack2x16float(weights[base + columns / 8u + k / 32u]);
    let q = weights[base + k / 8u];
    return Eight(
        vec4<f32>((vec4(q) >> vec4(0u, 4u, 8u, 12u)) & vec4(15u)) * scales.x + scales.y,
        vec4<f32>((vec4(q) >> vec4(16u, 20u, 24u, 28u)) & vec4(15u)) * scales.x + scales.y,
    );
}
