// Which of four neighbouring columns of one row dropout leaves. A counter-based generator, so that any
// kernel finds the same masks again: 16 bits a column out of a 32-bit hash (the finalizer of Wellons,
// "lowbias32") of the row's key, the matrix's key and the quad of columns, and out of one round more of it.
fn mixed(value: u32) -> u32 {
    var x = value;
    x = (x ^ (x >> 16u)) * 0x7feb352du;
    x = (x ^ (x >> 15u)) * 0x846ca68bu;
    return x ^ (x >> 16u);
}

// Of the columns of a matrix: the same for all rows, whose keys are hashes already.
fn quad_key(matrix: u32, quad: u32) -> u32 { return matrix + quad * 0x9e3779b9u; }

// Halves of words are compared where they are: what lies below the upper ones changes nothing.
fn kept(row: u32, key: u32) -> vec4<bool> {
    let first = mixed(row ^ key);
    let product = first * 0xc2b2ae3du;
    let second = product ^ (product >> 16u);
    return vec4(first << 16u, first, second << 16u, second) >= vec4({{ dropout.threshold * 65536 }}u);
}

fn after_dropout(values: vec4<f32>, row: u32, key: u32) -> vec4<f32> {
    return select(vec4(0.0), values, kept(row, key));
}
