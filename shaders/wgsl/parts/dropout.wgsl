// Which of eight neighbouring columns of one row dropout leaves. A counter-based generator, so that any
// kernel finds the same masks again: 16 bits a column out of four 32-bit words, each a round of its own
// (a product, and its upper half into its lower one) of a first round, that the words share, of the row's
// key, the matrix's key and the eight of columns. Keys are hashes already.
fn mixed(value: u32) -> u32 { // the finalizer of Wellons, "lowbias32"
    var x = value;
    x = (x ^ (x >> 16u)) * 0x7feb352du;
    x = (x ^ (x >> 15u)) * 0x846ca68bu;
    return x ^ (x >> 16u);
}

// Of one of a matrix's columns, for `mixed`.
fn column_key(matrix: u32, column: u32) -> u32 { return matrix + column * 0x9e3779b9u; }

// Of the columns of an eight: the same for all rows. The lowest bit says which quad of it is meant.
fn quad_key(matrix: u32, quad: u32) -> u32 { return (column_key(matrix, quad >> 1u) & 0xfffffffeu) | (quad & 1u); }
fn eight_key(matrix: u32, eight: u32) -> u32 { return column_key(matrix, eight) | 1u; }

fn round_of(value: u32, factor: u32) -> u32 {
    let product = value * factor;
    return product ^ (product >> 16u);
}

// Halves of words are compared where they are: what lies below the upper ones changes nothing.
fn kept(row: u32, key: u32) -> vec4<bool> {
    let begun = round_of(row ^ (key | 1u), 0x7feb352du);
    let second = (key & 1u) == 1u;
    let a = round_of(begun, select(0x846ca68bu, 0x27d4eb2fu, second));
    let b = round_of(begun, select(0xc2b2ae3du, 0x165667b1u, second));
    return vec4(a << 16u, a, b << 16u, b) >= vec4({{ dropout.threshold * 65536 }}u);
}

fn after_dropout(values: vec4<f32>, row: u32, key: u32) -> vec4<f32> {
    return select(vec4(0.0), values, kept(row, key));
}

fn kept_bits(word: u32) -> u32 {
    return select(0u, 0xffffu, (word << 16u) >= {{ dropout.threshold * 65536 }}u) | select(0u, 0xffff0000u, word >= {{ dropout.threshold * 65536 }}u);
}

// Of eight f16, two a word.
fn eight_after_dropout(values: vec4<u32>, row: u32, key: u32) -> vec4<u32> {
    let begun = round_of(row ^ key, 0x7feb352du);
    return values & vec4(
        kept_bits(round_of(begun, 0x846ca68bu)), kept_bits(round_of(begun, 0xc2b2ae3du)),
        kept_bits(round_of(begun, 0x27d4eb2fu)), kept_bits(round_of(begun, 0x165667b1u)),
    );
}
