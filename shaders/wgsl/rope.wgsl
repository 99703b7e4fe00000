// Rotates pairs of columns of the q and k heads by the angle of their position, in place:
//   (a, b) → (a · cos − b · sin, b · cos + a · sin);   backward: the inverse rotation (−sin).
//
// Bindings: qkv [rows, stride] of {{ qkv_type }}, positions u32 [rows], tables [n_positions, half, 2] (cos, sin).
// Pairs are (2j, 2j + 1) where interleaved (GGUFs of the llama architecture, whose q and k rows are
// permuted for it), else (j, j + half). One lane {{ unit }} pair{{ "s" if unit > 1 }} of a head.
{% if splits > 1 %}
// What is turned is Σ_s partial[s, m, i], in the order of matmul_reduce.wgsl, of the partial sums
// [{{ splits }}, maximum rows, stride] that a product leaves, rounded as qkv would hold it. Columns that do not turn are
// that sum: one lane a vector.{% if kept_type %} Before scales [stride], which each sum is multiplied by first, it goes to kept [rows, stride], too.{% endif %}

{% elif n_heads %}
// Columns of k and v are first Σ_h partial[m, 0, h] and Σ_h partial[m, 1, h] over the query heads h that share the key head, in
// the order of attention_backward_kv_sum.wgsl, partial [rows, 2, n_heads head_size], rounded as qkv would hold them. One
// lane a vector of v.
{% endif %}

struct Extent { rows: u32 }

{% set type = "vec4<f32>" if unit == 4 else "f32" %}
{% from "parts/stored.wgsl" import stored %}
{% macro as_stored(value) -%}
{% if unit == 1 and qkv_type == "f16" %}f16({{ value }}){% else %}{{ stored(value, qkv_type) }}{% endif %}
{%- endmacro %}
@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read_write> qkv: array<{{ "vec4<%s>" % qkv_type if unit == 4 else qkv_type }}>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read> tables: array<{{ "vec4<f32>" if unit == 4 else "vec2<f32>" }}>;
{% if splits > 1 or n_heads %}
@group(0) @binding(4) var<storage, read> partial: array<vec4<f32>>;
{% from "parts/row_parts.wgsl" import added %}
{% endif %}
{% if kept_type %}
@group(0) @binding(5) var<storage, read> scales: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> kept: array<vec4<{{ kept_type }}>>;
{% endif %}
{% if splits > 1 %}

// Of a vector of columns of a row, as qkv holds it.
fn total(at: u32) -> vec4<{{ qkv_type }}> {
    let sum = {{ added("partial", "at", 0, splits, maximum_rows * stride // 4) }};
{% if kept_type %}
    kept[at] = {{ stored("sum", kept_type) }};
    let scaled = scales[at % {{ stride // 4 }}u] * sum;
    return {{ stored("scaled", qkv_type) }};
{% else %}
    return {{ stored("sum", qkv_type) }};
{% endif %}
}
{% elif n_heads %}
{% set quads = head_size // 4 %}
{% set shared_heads = n_heads // n_kv_heads %}

// Of a head of k, or of v, which follow those of k.
fn head_sum(row: u32, kv_head: u32, column: u32) -> vec4<f32> {
    let at = row * {{ 2 * n_heads * quads }}u + kv_head * {{ shared_heads * quads }}u + column;
    return {{ added("partial", "at", 0, shared_heads, quads) }};
}
{% endif %}

const units = {{ half // unit }}u; // a head
const row_units = {{ half // unit * n_rotated_heads }}u;
{% set rest = (stride - n_rotated_heads * head_size) // 4 if splits > 1 or n_heads else 0 %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * {{ lanes }}u + lane;
{% if rest %}
    let row = index / (row_units + {{ rest }}u);
    if (row >= extent.rows) { return; }
    let unit = index % (row_units + {{ rest }}u);
    if (unit >= row_units) {
        let column = unit - row_units;
        let at = row * {{ stride // 4 }}u + {{ n_rotated_heads * head_size // 4 }}u + column;
{% if splits > 1 %}
        qkv[at] = total(at);
{% else %}
        let of_v = head_sum(row, {{ n_kv_heads }}u + column / {{ quads }}u, column % {{ quads }}u);
        qkv[at] = {{ stored("of_v", qkv_type) }};
{% endif %}
        return;
    }
{% else %}
    let row = index / row_units;
    if (row >= extent.rows) { return; }
    let unit = index % row_units;
{% endif %}
    let head = unit / units;
    let j = unit % units;
    let base = row * {{ stride // unit }}u + head * {{ head_size // unit }}u;
{% if interleaved %}
    let at_a = base + 2u * j;
    let at_b = at_a + 1u;
{% else %}
    let at_a = base + j;
    let at_b = at_a + units;
{% endif %}
{% if n_heads %}
    var first: vec4<f32>;
    var second: vec4<f32>;
    if (head < {{ n_heads }}u) {
        first = vec4<f32>(qkv[at_a]);
        second = vec4<f32>(qkv[at_b]);
    } else {
        first = head_sum(row, head - {{ n_heads }}u, at_a - base);
        second = head_sum(row, head - {{ n_heads }}u, at_b - base);
        first = vec4<f32>({{ stored("first", qkv_type) }});
        second = vec4<f32>({{ stored("second", qkv_type) }});
    }
{% elif splits == 1 %}
    let first = {{ type }}(qkv[at_a]);
    let second = {{ type }}(qkv[at_b]);
{% else %}
    let first = {{ type }}(total(at_a));
    let second = {{ type }}(total(at_b));
{% endif %}
{% if unit == 4 %}
    let table = 2u * (positions[row] * units + j);
    let angles_0 = tables[table];
    let angles_1 = tables[table + 1u];
    let cosine = vec4(angles_0.xz, angles_1.xz);
    let sine = {{ "-" if inverse else "" }}vec4(angles_0.yw, angles_1.yw);
{% else %}
    let angle = tables[positions[row] * units + j];
    let cosine = angle.x;
    let sine = {{ "-" if inverse else "" }}angle.y;
{% endif %}
{% if unit == 4 and interleaved %}
    let a = vec4(first.xz, second.xz);
    let b = vec4(first.yw, second.yw);
{% else %}
    let a = first;
    let b = second;
{% endif %}
    let turned_a = a * cosine - b * sine;
    let turned_b = b * cosine + a * sine;
{% if unit == 4 and interleaved %}
    qkv[at_a] = {{ as_stored("vec4(turned_a.x, turned_b.x, turned_a.y, turned_b.y)") }};
    qkv[at_b] = {{ as_stored("vec4(turned_a.z, turned_b.z, turned_a.w, turned_b.w)") }};
{% else %}
    qkv[at_a] = {{ as_stored("turned_a") }};
    qkv[at_b] = {{ as_stored("turned_b") }};
{% endif %}
}
