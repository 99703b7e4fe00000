// BF16: two weights a word, the first in the low half; a BF16 is the upper half of an f32.
fn bf16_pair(word: u32) -> vec2<f32> {
    return bitcast<vec2<f32>>(vec2(word << 16u, word & 0xffff0000u));
}

fn decode8(row: u32, k: u32) -> Eight {
    let at = row * row_words + k / 2u;
    return Eight(
        vec4(bf16_pair(weights[at]), bf16_pair(weights[at + 1u])),
        vec4(bf16_pair(weights[at + 2u]), bf16_pair(weights[at + 3u])),
    );
}
