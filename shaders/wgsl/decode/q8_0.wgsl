// Q8_0: w = d · q, blocks of 32. A row is its quants (8 words a block, in order), then its scales
// (f16, two a word).
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let d = unpack2x16float(weights[base + columns / 4u + k / 64u] >> ((k / 2u) & 16u)).x;
    let at = base + k / 4u;
    return Eight(
        vec4<f32>(unpack4xI8(weights[at])) * d,
        vec4<f32>(unpack4xI8(weights[at + 1u])) * d,
    );
}
