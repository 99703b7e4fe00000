// The sixteen levels of IQ4_NL and IQ4_XS: -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53,
// 69, 89, 113 for q = 0 … 15, four signed bytes a constant. An array indexed by q would be memory.
fn iq4_values(q: vec4<u32>) -> vec4<f32> {
    let upper_four = (q & vec4(4u)) != vec4(0u);
    let negative = select(vec4(0xbfad9881u), vec4(0xf6eaddcfu), upper_four);
    let positive = select(vec4(0x26190d01u), vec4(0x71594535u), upper_four);
    let word = select(negative, positive, q > vec4(7u));
    // The byte q % 4 to the top of the word, then down again with its sign.
    let top = word << ((vec4(3u) - (q & vec4(3u))) * 8u);
    return vec4<f32>(bitcast<vec4<i32>>(top) >> vec4(24u));
}
