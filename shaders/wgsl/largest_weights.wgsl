// largest[n] = the bits of max_k |W[n, k]|, largest[rows + k] those of max_n |W[n, k]|.
// Bindings: weights (words of W [{{ rows }}, {{ row_words }}]), largest u32 [rows + columns], zeros before. One workgroup {{ band }} rows;
// a lane takes eight columns at once, {{ 8 * 64 }} apart. No order matters.

struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<storage, read> weights: array<u32>;
@group(0) @binding(1) var<storage, read_write> largest: array<atomic<u32>>;

const columns = {{ columns }}u;
const row_words = {{ row_words }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}

var<workgroup> of_rows: array<atomic<u32>, {{ band }}>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = (group.x + group.y * groups.x) * {{ band }}u;
    if (first >= {{ rows }}u) { return; }
    if (lane < {{ band }}u) { atomicStore(&of_rows[lane], 0u); }
    workgroupBarrier();
    for (var column = 8u * lane; column < columns; column += {{ 8 * 64 }}u) {
        var a = vec4<u32>();
        var b = vec4<u32>();
        for (var row = 0u; row < min({{ band }}u, {{ rows }}u - first); row++) {
            let w = decode8(first + row, column);
            let w_a = bitcast<vec4<u32>>(abs(w.a));
            // Past the columns lies what is another row's.
            let w_b = select(vec4<u32>(), bitcast<vec4<u32>>(abs(w.b)), column + 4u < columns);
            a = max(a, w_a);
            b = max(b, w_b);
            let both = max(w_a, w_b);
            atomicMax(&of_rows[row], max(max(both.x, both.y), max(both.z, both.w)));
        }
{% for c in range(8) %}
{% if c < 4 %}
        atomicMax(&largest[{{ rows }}u + column + {{ c }}u], a[{{ c }}]);
{% else %}
        if (column + {{ c }}u < columns) { atomicMax(&largest[{{ rows }}u + column + {{ c }}u], b[{{ c - 4 }}]); }
{% endif %}
{% endfor %}
    }
    workgroupBarrier();
    if (lane < {{ band }}u && first + lane < {{ rows }}u) {
        atomicStore(&largest[first + lane], atomicLoad(&of_rows[lane]));
    }
}
