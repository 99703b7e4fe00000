// upper[n, k] + lower[n, k] = W[n, k] times the power of two that the largest number of its
// {{ "column" if by_columns else "row" }} asks for (parts/pairs.wgsl); zeros in rows from {{ rows }} and columns from {{ columns }} on.
// Bindings: weights (words of W [{{ rows }}, {{ row_words }}]), w_largest u32 [rows + columns] of largest_weights.wgsl, out u32
// [2, {{ padded_rows }}, {{ padded_columns }} / 2]: upper, then lower, two f16 a word, here four words an element. One lane eight columns.

struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<storage, read> weights: array<u32>;
@group(0) @binding(1) var<storage, read> w_largest: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<u32>>;

const columns = {{ columns }}u;
const row_words = {{ row_words }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}
{% from "parts/pairs.wgsl" import packing, scaling, pairing %}
{{ packing() }}
{{ scaling() }}
{{ pairing() }}

fn power_of(place: u32) -> f32 { return power(exponent_for(w_largest[place])); }
{% if by_columns %}

// Of the four columns from `column` on.
fn powers_of(column: u32) -> vec4<f32> {
    return vec4(
{% for c in range(4) %}
        power_of({{ rows }}u + min(column + {{ c }}u, columns - 1u)){{ "," if c < 3 }}
{% endfor %}
    );
}
{% endif %}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 256u + lane;
    if (index >= {{ padded_rows * padded_columns // 8 }}u) { return; }
    let row = index / {{ padded_columns // 8 }}u;
    let column = index % {{ padded_columns // 8 }}u * 8u;
    var made = Pair();
{% if rows < padded_rows or columns < padded_columns %}
    if (row < {{ rows }}u && column < columns) {
{% else %}
    {
{% endif %}
        var w = decode8(row, column);
{% if columns % 8 %}
        if (column + 4u >= columns) { w.b = vec4<f32>(); } // another row's
{% endif %}
{% if by_columns %}
        made = pair(w.a * powers_of(column), w.b * powers_of(column + 4u));
{% else %}
        let scale = power_of(row);
        made = pair(w.a * scale, w.b * scale);
{% endif %}
    }
    out[index] = made.upper;
    out[index + {{ padded_rows * padded_columns // 8 }}u] = made.lower;
}
