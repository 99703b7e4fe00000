// Storing a row v as whole numbers, as matmul_int_row.wgsl takes it. Of 32 neighbouring v the largest becomes
// ±4194303 = 2^22 - 1; each is rounded to a whole number of three signed digits of base 256, v ≈ scale · (d0 + 256 d1 +
// 65536 d2): no v is further from its number than 2^-23 of the largest, as f32 rounds the largest itself.
// int_row holds, with {{ int_blocks }} blocks of 32: [digit][half][block][4] words, a word of which is the digits of v at
// 8 e + 4 half + (0 … 3) of the block, e the word (as the quants of a word of four bits lie); then [block][4] f32:
// scale, Σ v of the block's first and of its second half, Σ y².
//
// A lane has four neighbouring columns ("quad"), eight lanes from a multiple of eight a block. Each calls
// share_quad, then comes a barrier, then store_quad.
var<workgroup> quad_shares: array<vec4<f32>, {{ int_quads }}>; // largest |v|, Σ v, Σ y²

// y: what v was before the norm's weight.
fn share_quad(slot: u32, v: vec4<f32>, y: vec4<f32>) {
    let size = abs(v);
    quad_shares[slot] = vec4(max(max(size.x, size.y), max(size.z, size.w)), dot(v, vec4(1.0)), dot(y, y), 0.0);
}

fn store_quad(slot: u32, quad: u32, v: vec4<f32>) {
    let first = slot & 0xfffffff8u;
{% for i in range(8) %}
    let share_{{ i }} = quad_shares[first + {{ i }}u];
{% endfor %}
    let largest = {% for i in range(7) %}max(share_{{ i }}.x, {% endfor %}max(share_7.x, 1.0e-30){{ ")" * 7 }};
    // 1.5 · 2^23 is added so that the whole number lies in the last bits; 128 to each digit makes them digits of
    // one sign, and turning the digits' top bits takes it off again.
    let whole = bitcast<vec4<u32>>(v * (4194303.0 / largest) + 12582912.0) - vec4(0x4b400000u);
    let digits = (whole + vec4(0x00808080u)) ^ vec4(0x00808080u);
    let block = quad / 8u;
    let at = 4u * (block + (quad & 1u) * {{ int_blocks }}u) + (quad & 7u) / 2u;
{% for p in range(3) %}
    let d_{{ p }} = (digits >> vec4({{ 8 * p }}u)) & vec4(255u);
    int_row[at + {{ 8 * p * int_blocks }}u] = d_{{ p }}.x | (d_{{ p }}.y << 8u) | (d_{{ p }}.z << 16u) | (d_{{ p }}.w << 24u);
{% endfor %}
    if (slot == first) {
        let about = {{ 24 * int_blocks }}u + 4u * block;
        int_row[about] = bitcast<u32>(largest * {{ 1 / 4194303 }});
        int_row[about + 1u] = bitcast<u32>(share_0.y + share_1.y + share_2.y + share_3.y);
        int_row[about + 2u] = bitcast<u32>(share_4.y + share_5.y + share_6.y + share_7.y);
        int_row[about + 3u] = bitcast<u32>({% for i in range(8) %}share_{{ i }}.z{{ " + " if not loop.last }}{% endfor %});
    }
}
