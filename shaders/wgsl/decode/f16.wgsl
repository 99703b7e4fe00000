// F16: two weights a word, the first in the low half.
fn decode8(row: u32, k: u32) -> Eight {
    let at = row * row_words + k / 2u;
    return Eight(
        vec4(unpack2x16float(weights[at]), unpack2x16float(weights[at + 1u])),
        vec4(unpack2x16float(weights[at + 2u]), unpack2x16float(weights[at + 3u])),
    );
}
