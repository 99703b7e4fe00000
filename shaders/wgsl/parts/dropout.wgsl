// What dropout leaves of four neighbouring columns of one row: 1 or 0 each. A counter-based generator, so
// that any kernel finds the same masks again: 16 bits a column out of two 32-bit hashes (the finalizer of
// Wellons, "lowbias32") of the row's key, the matrix's key and the quad of columns.
fn mixed(value: u32) -> u32 {
    var x = value;
    x = (x ^ (x >> 16u)) * 0x7feb352du;
    x = (x ^ (x >> 15u)) * 0x846ca68bu;
    return x ^ (x >> 16u);
}

// Of the columns of a matrix: the same for all rows.
fn quad_key(matrix: u32, quad: u32) -> u32 { return mixed(matrix + quad * 0x9e3779b9u); }

fn kept(row: u32, key: u32) -> vec4<f32> {
    let first = mixed(row ^ key);
    let second = mixed(first ^ 0x85ebca6bu);
    let bits = vec4(first & 0xffffu, first >> 16u, second & 0xffffu, second >> 16u);
    return select(vec4(0.0), vec4(1.0), bits >= vec4({{ dropout.threshold }}u));
}
