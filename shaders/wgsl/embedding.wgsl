// y[m] = W[tokens[m]] · scale for tokens in this part, [first_token, first_token + n_tokens).
// Bindings: tokens u32 [rows], weights (quantized words), y [rows, width]. One lane eight columns.

struct Extent { rows: u32 }
struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> weights: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;

const columns = {{ width }}u;
const row_words = {{ row_words }}u;
const eights = {{ (width + 7) // 8 }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / eights;
    if (row >= extent.rows) { return; }
    // Tokens below first_token wrap around to large numbers: one comparison serves both ends.
    let token = tokens[row] - {{ first_token }}u;
    if (token >= {{ n_tokens }}u) { return; }
    let column = (index % eights) * 8u;
    let w = decode8(token, column);
    let at = (row * columns + column) / 4u;
    y[at] = w.a * {{ scale }};
    if (column + 4u < columns) { y[at + 1u] = w.b * {{ scale }}; }
}
