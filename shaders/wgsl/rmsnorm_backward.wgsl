// d_x[m, i] = rstd · (g[i] − x[m, i] · rstd² · mean_i(g · x)) + residual[m, i],
//   g[i] = d_y[m, i] · weight[i],   rstd = 1 / sqrt(mean_i x[m, i]² + epsilon).
//
// Bindings: x of {{ x_type }}, d_y of {{ d_y_type }}, d_x of {{ out_type }}, residual [rows, width], weight [width]. In place
// (d_x is the residual) the residual is read from d_x. One workgroup a row; columns and sums as in rmsnorm.wgsl, the two sums
// at once.
{% if normed_type %}
// normed [rows, width] of {{ normed_type }} is what rmsnorm.wgsl gave, to its bits: x · rstd · weight.
{% endif %}
{% if sized %}
// largest u32 [rows] is what largest_of_rows.wgsl would find of d_x: the bits of max_i |d_x[m, i]|.
{% endif %}
{% if copied %}
// halves [rows, width] of f16, two in a u32, are d_x as the tiles of matmul_matrix.wgsl would hold it: each row times
// the power of two that brings its largest number to 2^4 … 2^5.
{% endif %}
{% if picked %}
// The norm was given some rows alone: x and d_y have those of row m in row slots[m], and d_x[m] = 0 where slots[m] is
// 0xffffffff; slots u32 [rows].
{% endif %}
{% if splits > 1 %}
// d_y is in no array: it is Σ_s partial[s, m, i], in the order of matmul_reduce.wgsl, of the partial sums
// [{{ splits }}, maximum rows, width] that a product leaves.
{% endif %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
{% if splits == 1 %}
@group(0) @binding(3) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
{% else %}
@group(0) @binding(3) var<storage, read> partial: array<vec4<f32>>;
{% endif %}
@group(0) @binding(4) var<storage, read_write> d_x: array<vec4<{{ out_type }}>>;
{% if residual == "separate" %}
@group(0) @binding(5) var<storage, read> residual: array<vec4<f32>>;
{% endif %}
{% set after = 6 if residual == "separate" else 5 %}
{% if normed_type %}
@group(0) @binding({{ after }}) var<storage, read_write> normed: array<vec4<{{ normed_type }}>>;
{% endif %}
{% if sized %}
@group(0) @binding({{ after + (1 if normed_type else 0) }}) var<storage, read_write> largest: array<u32>;

var<workgroup> largest_bits: atomic<u32>;
{% endif %}
{% set after_sizes = after + (1 if normed_type else 0) + (1 if sized else 0) %}
{% if copied %}
@group(0) @binding({{ after_sizes }}) var<storage, read_write> halves: array<vec2<u32>>;
{% endif %}
{% if picked %}
@group(0) @binding({{ after_sizes + (1 if copied else 0) }}) var<storage, read> slots: array<u32>;
{% endif %}

{% set quads = width // 4 %}
{% set steps = (quads + lanes - 1) // lanes %}
{% set sum_type = "vec2<f32>" %}
{% set given = "given" if picked else "base" %}
{% from "parts/row_parts.wgsl" import load_row, round_row, store_row %}
{% from "parts/stored.wgsl" import stored %}
{% from "parts/row_power.wgsl" import store_scaled %}
{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= extent.rows) { return; }
    let base = row * {{ quads }}u + lane;
{% if picked %}
    let slot = slots[row];
    if (slot == 0xffffffffu) {
{% for s in range(steps) %}
{% call store_row(s, quads, lanes) %}
d_x[base + {{ s * lanes }}u] = vec4<{{ out_type }}>();{{ " halves[base + %du] = vec2(0u);" % (s * lanes) if copied }}
{% endcall %}
{% endfor %}
{% if sized %}
        if (lane == 0u) { largest[row] = 0u; }
{% endif %}
        return;
    }
    let given = slot * {{ quads }}u + lane;
{% endif %}
{% if sized %}
    if (lane == 0u) { atomicStore(&largest_bits, 0u); } // row_sum has a barrier
{% endif %}
    // All at once, so that the loads wait for memory together.
{{ load_row("value", "x", given, quads, lanes) }}
{% if splits == 1 %}
{{ load_row("g", "d_y", given, quads, lanes) }}
{% else %}
{{ load_row("g", "partial", "base", quads, lanes, splits, maximum_rows * quads) }}
{% endif %}
{{ load_row("w", "weight", "lane", quads, lanes) }}
{% if residual != "none" %}
{{ load_row("past", "residual" if residual == "separate" else "d_x", "base", quads, lanes) }}
{% endif %}
{% if splits > 1 %}
{{ round_row("g", d_y_type, quads, lanes) }}
{% endif %}
    var squares = vec4<f32>();
    var products = vec4<f32>();
{% for s in range(steps) %}
    g_{{ s }} *= w_{{ s }};
    squares += value_{{ s }} * value_{{ s }};
    products += value_{{ s }} * g_{{ s }};
{% endfor %}
    let sums = row_sum(vec2(dot(squares, vec4(1.0)), dot(products, vec4(1.0))), lane);
    let rstd = inverseSqrt(sums.x / {{ width }}.0 + {{ epsilon }});
    let slope = sums.y / {{ width }}.0 * rstd * rstd;
{% if sized %}
    var own_bits = vec4<u32>();
{% endif %}
{% for s in range(steps) %}
{% set value = stored(("past_%d + " % s if residual != "none" else "") ~ "rstd * (g_%d - value_%d * slope)" % (s, s), out_type) %}
{% if sized %}
    let d_x_{{ s }} = {{ value }};
{% endif %}
{% call store_row(s, quads, lanes) %}
{% if sized %}
own_bits = max(own_bits, bitcast<vec4<u32>>(abs(d_x_{{ s }}))); d_x[base + {{ s * lanes }}u] = d_x_{{ s }};
{% else %}
d_x[base + {{ s * lanes }}u] = {{ value }};
{% endif %}
{% endcall %}
{% if normed_type %}
{% call store_row(s, quads, lanes) %}
normed[base + {{ s * lanes }}u] = {{ stored("value_%d * rstd * w_%d" % (s, s), normed_type) }};
{% endcall %}
{% endif %}
{% endfor %}
{% if sized %}
    atomicMax(&largest_bits, max(max(own_bits.x, own_bits.y), max(own_bits.z, own_bits.w)));
    workgroupBarrier();
    if (lane == 0u) { largest[row] = atomicLoad(&largest_bits); }
{% endif %}
{% if copied %}
{{ store_scaled("halves", "d_x", "atomicLoad(&largest_bits)", quads, lanes) }}
{% endif %}
}
