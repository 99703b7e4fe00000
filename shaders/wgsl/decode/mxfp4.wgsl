// MXFP4: w = ± 2^(e - 128) · level(q), blocks of 32; the levels are e2m1 numbers, doubled. A row is
// its quants (a word an eight: weight j in the lower nibble of byte j, weight 4 + j in the upper; the
// uppermost bit of a nibble is the sign), then its scales (e, four a word).

// |level| of four quants, whose lower three bits stand in bits 2 … 4 of `q`: the levels 0, 1, 2, 3, 4,
// 6, 8, 12 are the nibbles of a constant.
fn mxfp4_levels(q: vec4<u32>) -> vec4<f32> {
    return vec4<f32>((vec4(0xc8643210u) >> (q & vec4(28u))) & vec4(15u));
}

fn decode8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
    let e = extractBits(weights[base + columns / 8u + k / 128u], (k / 4u) & 24u, 8u);
    // 2^(e - 128) is no normal f32 for e < 2, and devices may take it for zero: two factors that are.
    let d = bitcast<f32>((max(e, 2u) - 1u) << 23u);
    let below = select(1.0, select(0.5, 0.25, e == 0u), e < 2u);
    let q = weights[base + k / 8u];
    let a = mxfp4_levels(vec4(q << 2u, q >> 6u, q >> 14u, q >> 22u)) * below * d;
    let b = mxfp4_levels(vec4(q >> 2u, q >> 10u, q >> 18u, q >> 26u)) * below * d;
    let sign = vec4(0x80000000u);
    return Eight(
        bitcast<vec4<f32>>(bitcast<vec4<u32>>(a) | (vec4(q << 28u, q << 20u, q << 12u, q << 4u) & sign)),
        bitcast<vec4<f32>>(bitcast<vec4<u32>>(b) | (vec4(q << 24u, q << 16u, q << 8u, q) & sign)),
    );
}
