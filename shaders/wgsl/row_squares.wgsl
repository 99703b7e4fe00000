// squares[first + n] = Σ_k W[n, k]²
//
// Bindings: place (first), weights (words of W [{{ rows }}, {{ row_words }}]), squares [rows of the whole matrix]. One workgroup
// a row; a lane takes eight columns at once, {{ 8 * 64 }} apart, and the lanes meet in row_sum.

struct Eight { a: vec4<f32>, b: vec4<f32> }
struct Place { first: u32 }

@group(0) @binding(0) var<uniform> place: Place;
@group(0) @binding(1) var<storage, read> weights: array<u32>;
@group(0) @binding(2) var<storage, read_write> squares: array<f32>;

const columns = {{ columns }}u;
const row_words = {{ row_words }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}
{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= {{ rows }}u) { return; }
    var sum = vec4<f32>();
    for (var column = 8u * lane; column < columns; column += {{ 8 * 64 }}u) {
        let w = decode8(row, column);
        sum += w.a * w.a;
        if (column + 4u < columns) { sum += w.b * w.b; }
    }
    let whole = row_sum(dot(sum, vec4(1.0)), lane);
    if (lane == 0u) { squares[place.first + row] = whole; }
}
