// bounds[n] = (Σ_k (v[k] · W[n, k])², Σ_k |v[k] · W[n, k]|, max_k |W[n, k]|, 0)
//
// Bindings: weights (words of W [{{ rows }}, {{ row_words }}]), v [{{ columns }}], bounds [{{ rows }}]. One workgroup a row; a lane takes
// eight columns at once, {{ 8 * 64 }} apart, and the lanes meet in row_sum.

struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<storage, read> weights: array<u32>;
@group(0) @binding(1) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> bounds: array<vec4<f32>>;

const columns = {{ columns }}u;
const row_words = {{ row_words }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}
{% set sum_type = "vec2<f32>" %}
{% include "parts/row_sum.wgsl" %}
var<workgroup> largest: array<atomic<u32>, 1>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= {{ rows }}u) { return; }
    if (lane == 0u) { atomicStore(&largest[0], 0u); }
    workgroupBarrier();
    var squares = vec4<f32>();
    var sizes = vec4<f32>();
    var most = vec4<f32>();
    for (var column = 8u * lane; column < columns; column += {{ 8 * 64 }}u) {
        let w = decode8(row, column);
        let a = w.a * v[column / 4u];
        squares += a * a;
        sizes += abs(a);
        most = max(most, abs(w.a));
        if (column + 4u < columns) {
            let b = w.b * v[column / 4u + 1u];
            squares += b * b;
            sizes += abs(b);
            most = max(most, abs(w.b));
        }
    }
    atomicMax(&largest[0], bitcast<u32>(max(max(most.x, most.y), max(most.z, most.w))));
    let whole = row_sum(vec2(dot(squares, vec4(1.0)), dot(sizes, vec4(1.0))), lane);
    workgroupBarrier();
    if (lane == 0u) { bounds[row] = vec4(whole, bitcast<f32>(atomicLoad(&largest[0])), 0.0); }
}
