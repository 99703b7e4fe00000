// The quantized matmul for one row of x as whole numbers (int_row_store.wgsl), as in text generation on a GPU:
//
//   out[n] = epilogue(rstd · (Σ_k v[k] · W[n, k] + low_rank_scale · Σ_r low[r] · factor[n, r]))
//
// v[k] = scale · Σ_p 256^p d_p[k] for the 32 columns of a block, and W[n, k] = d · q - m: what is multiplied are the
// bytes d_p and q, four at a time into whole sums that are exact. Decoding to floats took more time than reading
// the weights: three instructions a weight, where here 36 do for 32.
{% if epsilon is not none %}
// rstd = 1 / sqrt(mean_k y[k]² + epsilon): the row brings Σ y² of its blocks, and the norm's weight is in v.
{% else %}
// rstd = 1.
{% endif %}
{% if gate %}
// W holds the rows of a gate before as many of up: out[n] = activation(y[n]) · y[n + {{ n_columns }}].
{% endif %}
// Bindings: row u32 [{{ contraction // 32 }} · 28], weights (words of W), out, then what there is of low [members · rank] and factor
// (B [n, rank]), residual, bias, place, int_out and its next_weight (the row that comes out, for the next product).
// {{ share }} lanes share the sums of {{ weight_rows }} rows of W: a lane adds its vec4s of the low-rank part and then its blocks,
// those at part, part + {{ share }}, … in this order, {{ steps }} of them loaded at once; a lane then adds every {{ parts }}th of a
// sum's lanes, and {{ parts }} such sums meet in order. A workgroup has {{ lanes // share }} such groups of rows.

{% set binding = namespace(next=3) %}
{% macro bind(name, space="storage, read", type="array<vec4<f32>>") %}
@group(0) @binding({{ binding.next }}) var<{{ space }}> {{ name }}: {{ type }};
{% set binding.next = binding.next + 1 %}
{% endmacro %}
@group(0) @binding(0) var<storage, read> row: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
{% if members %}
{{ bind("low") }}
{{ bind("factor") }}
{% endif %}
{% if epilogue == "residual" %}
{{ bind("residual") }}
{% endif %}
{% if bias %}
{{ bind("bias") }}
{% endif %}
{% if placed %}
// Parts of one matrix share a kernel: where the columns of this part begin in out.
struct Place { unused: u32, out_column: u32 }
{{ bind("place", "uniform", "Place") }}
{% endif %}
{% if int_out %}
{{ bind("int_row", "storage, read_write", "array<u32>") }}
{% if next_norm %}
{{ bind("next_weight") }}
{% endif %}
{% endif %}

{% set blocks = contraction // 32 %}
{% set groups = lanes // share %}
{% set group_columns = weight_rows // 2 if gate else weight_rows %}{# of out #}
{% set columns = groups * group_columns %}{# of a workgroup #}
{% set sums = groups * weight_rows %}
const lanes = {{ lanes }}u;
const share = {{ share }}u;
const blocks = {{ blocks }}u;
const n_columns = {{ n_columns }}u; // of the output
const row_quads = {{ row_words // 4 }}u;
const low_rank_scale = {{ scale }};

var<workgroup> lane_sums: array<f32, {{ lanes * weight_rows }}>; // [row of the group][lane]
var<workgroup> part_sums: array<f32, {{ sums * parts }}>; // [row of the workgroup][part]
{% if epsilon is not none %}
{% set square_parts = [share, 8] | min %}
var<workgroup> lane_squares: array<f32, share>;
var<workgroup> part_squares: array<f32, {{ square_parts }}>;
{% endif %}

{% include "parts/matmul_int_row_quants.wgsl" %}
{% from "parts/matmul_int_row_quants.wgsl" import load_block, unpack_eight, halved, minimum with context %}
{% if gate %}
{% include "parts/activation.wgsl" %}
{% else %}
{% include "parts/matmul_epilogue.wgsl" %}
{% endif %}
{% if int_out %}
{% with int_blocks = n_columns // 32, int_quads = columns // 4 %}{% include "parts/int_row_store.wgsl" %}{% endwith %}
{% endif %}

// Sums of products with the three digits of v as one number.
fn joined(digit_0: i32, digit_1: i32, digit_2: i32) -> f32 {
    return f32(digit_2) * 65536.0 + (f32(digit_1) * 256.0 + f32(digit_0));
}

{# n blocks of a lane, the first of them at b. #}
{% macro add_blocks(n) %}
{% for s in range(n) %}
{% set at = "b + %du" % (s * share) if s else "b" %}
{% for r in range(weight_rows) %}
{{ load_block("w_%d_%d" % (s, r), "row_%d" % r, at) -}}
{% endfor %}
{% endfor %}
{% for s in range(n) %}
{% set at = "b + %du" % (s * share) if s else "b" %}
        let about_{{ s }} = bitcast<vec4<f32>>(row[6u * blocks + {{ at }}]);
{% for p in range(3) %}
        let x_{{ s }}_{{ p }}a = row[{{ 2 * p }}u * blocks + {{ at }}];
        let x_{{ s }}_{{ p }}b = row[{{ 2 * p + 1 }}u * blocks + {{ at }}];
{% endfor %}
{% if epsilon is not none %}
        squares += about_{{ s }}.w;
{% endif %}
{% for r in range(weight_rows) %}
{% set w = "w_%d_%d" % (s, r) %}
        {
{% for half in range(2 if halved else 1) %}
{% for p in range(3) %}
            var digit_{{ p }}_{{ half }} = 0;
{% endfor %}
{% for e in (range(2 * half, 2 * half + 2) if halved else range(4)) %}
{{ unpack_eight(w, e, "q_%d" % e) -}}
{% for p in range(3) %}
            digit_{{ p }}_{{ half }} += dot4I8Packed(q_{{ e }}_a, x_{{ s }}_{{ p }}a[{{ e }}]);
            digit_{{ p }}_{{ half }} += dot4I8Packed(q_{{ e }}_b, x_{{ s }}_{{ p }}b[{{ e }}]);
{% endfor %}
{% endfor %}
            let product_{{ half }} = about_{{ s }}.x * joined(digit_0_{{ half }}, digit_1_{{ half }}, digit_2_{{ half }});
{% endfor %}
{% if halved %}
            sum_{{ r }} += {{ w }}_scale.x * (product_0 - {{ zero }}.0 * about_{{ s }}.y);
            sum_{{ r }} += {{ w }}_scale.y * (product_1 - {{ zero }}.0 * about_{{ s }}.z);
{% elif zero %}
            sum_{{ r }} += {{ w }}_scale.x * (product_0 - {{ zero }}.0 * (about_{{ s }}.y + about_{{ s }}.z));
{% elif minimum %}
            sum_{{ r }} += {{ w }}_scale.x * product_0 + {{ w }}_scale.y * (about_{{ s }}.y + about_{{ s }}.z);
{% else %}
            sum_{{ r }} += {{ w }}_scale.x * product_0;
{% endif %}
        }
{% endfor %}
{% endfor %}
{% endmacro %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let part = lane % share;
    let first = (group.x + group.y * groups.x) * {{ columns }}u;
    // Lanes past the end compute the last columns once more and do not store them: barriers follow.
    let column = min(first + lane / share * {{ group_columns }}u, n_columns - {{ group_columns }}u);
{% for r in range(weight_rows) %}
    let row_{{ r }} = (column + {{ r if not gate or r < weight_rows // 2 else "n_columns + %d" % (r - weight_rows // 2) }}u) * row_quads;
    var sum_{{ r }} = 0.0;
{% endfor %}
{% if epsilon is not none %}
    var squares = 0.0;
{% endif %}

{% for member in members %}
{% for r in range(weight_rows) %}
    {
        let n = column + {{ r if not gate or r < weight_rows // 2 else "n_columns + %d" % (r - weight_rows // 2) }}u;
        if (n >= {{ member.start }}u && n < {{ member.stop }}u) {
            let at = (n - {{ member.start }}u + {{ member.factor_start }}u) * {{ rank // 4 }}u;
            for (var i = part; i < {{ rank // 4 }}u; i += share) {
                sum_{{ r }} += low_rank_scale * dot(low[{{ member.low_start // 4 }}u + i], factor[at + i]);
            }
        }
    }
{% endfor %}
{% endfor %}

{# Every lane has `whole` blocks; some have one more. #}
{% set whole = blocks // share // steps * steps %}
    var b = part;
{% if whole > steps %}
    while (b < {{ share * whole }}u) {
{{ add_blocks(steps) }}
        b += {{ share * steps }}u;
    }
{% elif whole %}
    {
{{ add_blocks(steps) }}
        b += {{ share * steps }}u;
    }
{% endif %}
{% if share * whole < blocks %}
    while (b < blocks) {
{{ add_blocks(1) }}
        b += share;
    }
{% endif %}

{% for r in range(weight_rows) %}
    lane_sums[{{ r * lanes }}u + lane] = sum_{{ r }};
{% endfor %}
{% if epsilon is not none %}
    if (lane < share) { lane_squares[lane] = squares; }
{% endif %}
    workgroupBarrier();
    if (lane < {{ sums * parts }}u) {
        let at = lane / {{ parts }}u; // the row of the workgroup
        let start = (at % {{ weight_rows }}u) * lanes + at / {{ weight_rows }}u * share + lane % {{ parts }}u;
        var sum = lane_sums[start];
{% for i in range(parts, share, parts) %}
        sum += lane_sums[start + {{ i }}u];
{% endfor %}
        part_sums[lane] = sum;
    }
{% if epsilon is not none %}
    if (lane < {{ square_parts }}u) {
        var sum = lane_squares[lane];
{% for i in range(square_parts, share, square_parts) %}
        sum += lane_squares[lane + {{ i }}u];
{% endfor %}
        part_squares[lane] = sum;
    }
{% endif %}
    workgroupBarrier();

{% macro whole_sum(column, up) %}{% set at = "((4u * lane + %du) / %du * %du + (4u * lane + %du) %% %du + %du)" % (column, group_columns, weight_rows, column, group_columns, up) %}
{% for i in range(parts) %}part_sums[{{ at }} * {{ parts }}u + {{ i }}u]{{ " + " if not loop.last }}{% endfor %}{% endmacro %}
    let is_stored = lane < {{ columns // 4 }}u && first + 4u * lane < n_columns;
    let quad = ({{ "place.out_column" if placed else "0u" }} + first) / 4u + lane;
{% if int_out %}
    var y = vec4<f32>();
    var v = vec4<f32>();
{% endif %}
    if (is_stored) {
        var sum = vec4({% for c in range(4) %}{{ whole_sum(c, 0) }}{{ ", " if c < 3 }}{% endfor %});
{% if gate %}
        var up = vec4({% for c in range(4) %}{{ whole_sum(c, weight_rows // 2) }}{{ ", " if c < 3 }}{% endfor %});
{% endif %}
{% if epsilon is not none %}
        let squares_of_row = {% for i in range(square_parts) %}part_squares[{{ i }}]{{ " + " if not loop.last }}{% endfor %};
        let rstd = inverseSqrt(squares_of_row / {{ contraction }}.0 + {{ epsilon }});
        sum *= rstd;
{% if gate %}
        up *= rstd;
{% endif %}
{% endif %}
{% if gate %}
{% if bias %}
        sum += bias[quad];
        up += bias[{{ n_columns // 4 }}u + quad];
{% endif %}
        out[quad] = gate_value(sum) * up;
{% else %}
        write_out(quad, quad, sum);
{% endif %}
{% if int_out %}
        y = out[quad];
        v = y{{ " * next_weight[quad]" if next_norm }};
        share_quad(lane, v, y);
{% endif %}
    }
{% if int_out %}
    workgroupBarrier();
    if (is_stored) { store_quad(lane, quad, v); }
{% endif %}
}
