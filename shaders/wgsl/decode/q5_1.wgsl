// Q5_1: w = d · q + m, blocks of 32. A row is the lower four bits of its quants and their fifth bits
// as in Q5_0, then one word (d, m as f16) a block.
fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let scales = unpack2x16float(weights[base + columns / 32u * 5u + k / 32u]);
    let q = weights[base + k / 8u];
    let fifth = weights[base + columns / 8u + k / 32u] >> ((k / 4u) & 6u);
    let a = (q & 0x0f0f0f0fu) | ((fifth & 0x01010101u) << 4u);
    let b = ((q >> 4u) & 0x0f0f0f0fu) | ((fifth & 0x02020202u) << 3u);
    return Eight(
        vec4<f32>(unpack4xU8(a)) * scales.x + scales.y,
        vec4<f32>(unpack4xU8(b)) * scales.x + scales.y,
    );
}
