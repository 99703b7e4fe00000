// dots[m, h] = Σ_d d_out[m, h, d] · out[m, h, d]: what the softmax's gradient takes off each d_p.
//
// Bindings: out and d_out [rows, n_heads head_size], dots [rows, n_heads].
// Eight lanes a row and head: each sums every eighth vec4; the 8 sums meet in order.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> out: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> d_out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> dots: array<f32>;

const lanes = 64u;
const head = {{ head_size // 4 }}u;

var<workgroup> lane_sums: array<f32, lanes>;

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 8u + lane / 8u; // row · n_heads + head
    let in_use = index < extent.rows * {{ n_heads }}u;
    var sum = 0.0;
    if (in_use) {
        for (var c = lane % 8u; c < head; c += 8u) {
            sum += dot(d_out[index * head + c], out[index * head + c]);
        }
    }
    lane_sums[lane] = sum;
    workgroupBarrier();
    if (in_use && lane % 8u == 0u) {
        for (var x = 1u; x < 8u; x += 1u) {
            sum += lane_sums[lane + x];
        }
        dots[index] = sum;
    }
}
