// F32: one word a weight.
fn decode8(row: u32, k: u32) -> Eight {
    let at = row * row_words + k;
    return Eight(
        bitcast<vec4<f32>>(vec4(weights[at], weights[at + 1u], weights[at + 2u], weights[at + 3u])),
        bitcast<vec4<f32>>(vec4(weights[at + 4u], weights[at + 5u], weights[at + 6u], weights[at + 7u])),
    );
}
