// y[m, i] = x[m, i] · rstd[m] · weight[i] (+ residual[m, i]),   rstd[m] = 1 / sqrt(mean_i x[m, i]² + epsilon)
//
// Bindings: x [rows, width] of {{ x_type }}, weight [width], y [rows, width] of {{ out_type }}, residual [rows, width].
// One workgroup a row. A lane holds the quads of columns lane, lane + {{ lanes }}, … and sums them in that
// order; the lanes' sums meet in row_sum.
{% if splits > 1 %}
// x is written here: {{ "scales[i] · " if kept_type }}Σ_s partial[s, m, i]{{ " + x_residual[m, i]" if x_residual }}, in the order of matmul_reduce.wgsl, of the
// partial sums [{{ splits }}, maximum rows, width] that a product leaves.{% if kept_type %} Before scales [width] it goes to kept [rows, width], too.{% endif %}

{% endif %}
{% if sized %}
// y is f16 as the tiles of matmul_matrix.wgsl would hold it, two in a u32: each row times the power of two that brings its
// largest number to 2^4 … 2^5. largest u32 [rows] are the bits of that number.

{% endif %}
{% if low_width %}
// z [rows, {{ low_width }}] is written here, too: z[m, j] = Σ_i y[m, i] · a[j, i], of y as it is stored. {{ sharing }} lanes share a sum,
// of every {{ sharing }} quads one each; their sums meet in workgroup memory, in order.
{% endif %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
{% if splits == 1 %}
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
{% else %}
@group(0) @binding(1) var<storage, read> partial: array<vec4<f32>>;
{% endif %}
@group(0) @binding(2) var<storage, read> weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> y: array<{{ "vec2<u32>" if sized else "vec4<%s>" % out_type }}>;
{% if residual %}
@group(0) @binding(4) var<storage, read> residual: array<vec4<f32>>;
{% endif %}
{% if splits > 1 %}
@group(0) @binding({{ 4 + residual }}) var<storage, read_write> x: array<vec4<{{ x_type }}>>;
{% if x_residual %}
@group(0) @binding({{ 5 + residual }}) var<storage, read> x_residual: array<vec4<f32>>;
{% endif %}
{% if kept_type %}
@group(0) @binding({{ 5 + residual + x_residual }}) var<storage, read> scales: array<vec4<f32>>;
@group(0) @binding({{ 6 + residual + x_residual }}) var<storage, read_write> kept: array<vec4<{{ kept_type }}>>;
{% endif %}
{% endif %}

{% if sized %}
@group(0) @binding({{ 4 + residual }}) var<storage, read_write> largest: array<u32>;

var<workgroup> largest_bits: atomic<u32>;
{% endif %}
{% if low_width %}
{% set after = 4 + residual + ((1 + x_residual + (2 if kept_type else 0)) if splits > 1 else 0) %}
@group(0) @binding({{ after }}) var<storage, read> a: array<vec4<f32>>; // [{{ low_width }}, {{ width }}]
@group(0) @binding({{ after + 1 }}) var<storage, read_write> z: array<f32>;

{% set low_lanes = lanes // sharing %}
{% set turns = (low_width + low_lanes - 1) // low_lanes %}
{% if out_type == "f16" %}
{% from "parts/unpacked.wgsl" import unpacking %}
{{ unpacking() }}
{% endif %}
var<workgroup> normed_row: array<vec4<f32>, {{ width // 4 }}>;
var<workgroup> low_sums: array<f32, {{ turns * lanes }}>; // [turns, lanes]
{% endif %}
{% set quads = width // 4 %}
{% set steps = (quads + lanes - 1) // lanes %}
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
{% if sized %}
    if (lane == 0u) { atomicStore(&largest_bits, 0u); } // row_sum has a barrier
{% endif %}
    // All at once, so that the loads wait for memory together.
{% if splits == 1 %}
{{ load_row("value", "x", "base", quads, lanes) }}
{% else %}
{{ load_row("value", "partial", "base", quads, lanes, splits, maximum_rows * quads) }}
{% if x_residual %}
{{ load_row("x_past", "x_residual", "base", quads, lanes) }}
{% endif %}
{% if kept_type %}
{{ load_row("scale", "scales", "lane", quads, lanes) }}
{% endif %}
{% endif %}
{{ load_row("w", "weight", "lane", quads, lanes) }}
{% if residual %}
{{ load_row("past", "residual", "base", quads, lanes) }}
{% endif %}
{% if splits > 1 %}
{% for s in range(steps) %}
{% if kept_type %}
{% call store_row(s, quads, lanes) %}
kept[base + {{ s * lanes }}u] = {{ stored("value_%d" % s, kept_type) }};
{% endcall %}
    value_{{ s }} *= scale_{{ s }};
{% endif %}
{% if x_residual %}
    value_{{ s }} += x_past_{{ s }};
{% endif %}
{% call store_row(s, quads, lanes) %}
x[base + {{ s * lanes }}u] = {{ stored("value_%d" % s, x_type) }};
{% endcall %}
{% endfor %}
{{ round_row("value", x_type, quads, lanes) }}
{% endif %}
    var squares = vec4<f32>();
{% for s in range(steps) %}
    squares += value_{{ s }} * value_{{ s }};
{% endfor %}
    let rstd = inverseSqrt(row_sum(dot(squares, vec4(1.0)), lane) / {{ width }}.0 + {{ epsilon }});
{% if sized %}
    var own_bits = vec4<u32>();
{% for s in range(steps) %}
    let normed_{{ s }} = {{ "past_%d + " % s if residual }}value_{{ s }} * rstd * w_{{ s }};
    own_bits = max(own_bits, bitcast<vec4<u32>>(abs(normed_{{ s }}))); // of lanes past the row 0
{% endfor %}
    atomicMax(&largest_bits, max(max(own_bits.x, own_bits.y), max(own_bits.z, own_bits.w)));
    workgroupBarrier();
    let row_bits = atomicLoad(&largest_bits);
    if (lane == 0u) { largest[row] = row_bits; }
{{ store_scaled("y", "normed", "row_bits", quads, lanes) }}
{% endif %}
{% for s in range(steps if not sized else 0) %}
{% set normed = stored(("past_%d + " % s if residual else "") ~ "value_%d * rstd * w_%d" % (s, s), out_type) %}
{% if low_width %}
    let normed_{{ s }} = {{ normed }};
{% call store_row(s, quads, lanes) %}
normed_row[lane + {{ s * lanes }}u] = {{ "rounded(vec4<f32>(normed_%d))" % s if out_type == "f16" else "normed_%d" % s }};
{% endcall %}
{% endif %}
{% call store_row(s, quads, lanes) %}
y[base + {{ s * lanes }}u] = {{ "normed_%d" % s if low_width else normed }};
{% endcall %}
{% endfor %}
{% if low_width %}
    workgroupBarrier();
    let share = lane % {{ sharing }}u;
{% for turn in range(turns) %}
    {
        // Past the last sum that one again, which nobody reads.
        let a_quad = min(lane / {{ sharing }}u + {{ turn * low_lanes }}u, {{ low_width - 1 }}u) * {{ quads }}u + share;
        var sum = vec4<f32>();
{% for q in range(0, quads, sharing) %}
{% if q + sharing <= quads %}
        sum += normed_row[share + {{ q }}u] * a[a_quad + {{ q }}u];
{% else %}
        if (share < {{ quads - q }}u) { sum += normed_row[share + {{ q }}u] * a[a_quad + {{ q }}u]; }
{% endif %}
{% endfor %}
        low_sums[{{ turn * lanes }}u + lane] = dot(sum, vec4(1.0));
    }
{% endfor %}
    workgroupBarrier();
    for (var j = lane; j < {{ low_width }}u; j += {{ lanes }}u) {
        var sum = low_sums[j * {{ sharing }}u];
{% for s in range(1, sharing) %}
        sum += low_sums[j * {{ sharing }}u + {{ s }}u];
{% endfor %}
        z[row * {{ low_width }}u + j] = sum;
    }
{% endif %}
}
