// The length of each row of W + s · B · A, by what is known of W (Liu et al. 2024, "DoRA"):
//   length² = ‖W_j‖² + 2 s Σ_r B[j, r] · (A_g Wᵀ)[r, j] + s² Σ_r Σ_q B[j, r] · (A_g A_gᵀ)[r, q] · B[j, q]
// inverses[j] = 1 / length (0 of a row of zeros), scales[j] = magnitudes[j] · inverses[j]; columns of the
// group that are not adapted get 0 and 1.
//
// Bindings: B [rows of all members, {{ rank }}], products A · Wᵀ [members · {{ rank }}, {{ columns }}], grams A · Aᵀ [members ·
// {{ rank }}, members · {{ rank }}], squares [{{ columns }}], magnitudes [rows of all members]; scales, inverses [{{ columns }}].
// One lane a column, r and q in order.

{% set low = members | length * rank %}
@group(0) @binding(0) var<storage, read> factor: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> products: array<f32>;
@group(0) @binding(2) var<storage, read> grams: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> squares: array<f32>;
@group(0) @binding(4) var<storage, read> magnitudes: array<f32>;
@group(0) @binding(5) var<storage, read_write> scales: array<f32>;
@group(0) @binding(6) var<storage, read_write> inverses: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let column = (group.x + group.y * groups.x) * 64u + lane;
    if (column >= {{ columns }}u) { return; }
    var member = {{ members | length }}u; // none
    var row = 0u; // of B
    var scale = 0.0;
{% for m in members %}
    if (column >= {{ m.start }}u && column < {{ m.stop }}u) {
        member = {{ loop.index0 }}u;
        row = {{ m.first }}u + column - {{ m.start }}u;
        scale = {{ m.scale }};
    }
{% endfor %}
    if (member == {{ members | length }}u) {
        scales[column] = 1.0;
        inverses[column] = 0.0;
        return;
    }
    var cross = 0.0;
    var own = 0.0;
    for (var r = 0u; r < {{ rank }}u; r += 1u) {
        let b = factor[row * {{ rank // 4 }}u + r / 4u][r % 4u];
        let low = member * {{ rank }}u + r;
        cross += b * products[low * {{ columns }}u + column];
        var sum = 0.0;
        for (var q = 0u; q < {{ rank // 4 }}u; q += 1u) {
            sum += dot(grams[(low * {{ low }}u + member * {{ rank }}u) / 4u + q], factor[row * {{ rank // 4 }}u + q]);
        }
        own += b * sum;
    }
    let square = squares[column] + 2.0 * scale * cross + scale * scale * own;
    let inverse = select(0.0, inverseSqrt(square), square > 0.0);
    inverses[column] = inverse;
    scales[column] = magnitudes[row] * inverse;
}
