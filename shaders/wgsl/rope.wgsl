// Rotates pairs of columns of the q and k heads by the angle of their position, in place:
//   (a, b) → (a · cos − b · sin, b · cos + a · sin);   backward: the inverse rotation (−sin).
//
// Bindings: qkv [rows, stride], positions u32 [rows], tables [n_positions, half, 2] (cos, sin).
// Pairs are (2j, 2j + 1) where interleaved (GGUFs of the llama architecture, whose q and k rows are
// permuted for it), else (j, j + half). One lane a pair.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read_write> qkv: array<f32>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read> tables: array<vec2<f32>>;

const half = {{ half }}u;
const pairs = {{ half * n_rotated_heads }}u; // a row

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / pairs;
    if (row >= extent.rows) { return; }
    let head = (index % pairs) / half;
    let j = index % half;
    let angle = tables[positions[row] * half + j];
    let base = row * {{ stride }}u + head * {{ head_size }}u;
{% if interleaved %}
    let at_a = base + 2u * j;
    let at_b = at_a + 1u;
{% else %}
    let at_a = base + j;
    let at_b = at_a + half;
{% endif %}
    let a = qkv[at_a];
    let b = qkv[at_b];
    let sine = {{ "-" if inverse else "" }}angle.y;
    qkv[at_a] = a * angle.x - b * sine;
    qkv[at_b] = b * angle.x + a * sine;
}
