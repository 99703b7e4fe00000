// out[n, k] = W[n, k]{{ " · powers[n]" if powered }}, rounded to f16.
// Bindings: weights (words of W [rows, {{ row_words }}]), out u32 [rows, columns / 2], two f16 a word, here four words
// an element. One lane eight columns.

struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<storage, read> weights: array<u32>;
@group(0) @binding(1) var<storage, read_write> out: array<vec4<u32>>;
{% if powered %}
@group(0) @binding(2) var<storage, read> powers: array<f32>;
{% endif %}

const columns = {{ columns }}u;
const row_words = {{ row_words }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 256u + lane;
    if (index >= {{ rows * columns // 8 }}u) { return; }
    {{ "var" if powered else "let" }} w = decode8(index / {{ columns // 8 }}u, index % {{ columns // 8 }}u * 8u);
{% if powered %}
    w = Eight(w.a * powers[index / {{ columns // 8 }}u], w.b * powers[index / {{ columns // 8 }}u]);
{% endif %}
    out[index] = vec4(
        pack2x16float(w.a.xy), pack2x16float(w.a.zw), pack2x16float(w.b.xy), pack2x16float(w.b.zw)
    );
}
