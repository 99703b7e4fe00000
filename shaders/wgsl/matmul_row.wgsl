// The quantized matmul for one row of x, as in text generation: every weight is read once.
//
//   out[n] = epilogue(rstd · (Σ_k v[k] · W[n, k] + scale · Σ_r low[r] · factor[n, r]))
//
{% if norm %}
// v = x ∘ norm_weight; rstd = 1 / sqrt(mean_k x[k]² + epsilon): the lanes add up the squares of what they load
// beside the sums, so that the norm costs no pass of its own.
{% else %}
// v = x and rstd = 1.
{% endif %}
{% if gate %}
// W holds the rows of a gate before as many of up: out[n] = activation(y[n]) · y[n + {{ n_columns }}].
{% endif %}
// Bindings: x [contraction], weights (words of W), out, then what there is of norm_weight [contraction],
// low [members · rank] and factor (B [n, rank]), residual, bias, place. {{ share }} lanes share the sums of {{ quads }} times four
// rows of W: a lane adds its vec4s of the low-rank part and then its eights of the contraction, those at part,
// part + {{ share }}, … in this order; the lanes' sums meet in a tree of branches of up to {{ branches }} in workgroup memory. A
// workgroup has {{ lanes // share }} such groups of rows. A lane's loop is written out {{ steps }} eights at a time, whose loads do not
// wait for one another: what a GPU reads in a second grows with the bytes it has in flight.

struct Eight { a: vec4<f32>, b: vec4<f32> }

{% set binding = namespace(next=3) %}
{% macro bind(name, space="storage, read", type="array<vec4<f32>>") %}
@group(0) @binding({{ binding.next }}) var<{{ space }}> {{ name }}: {{ type }};
{% set binding.next = binding.next + 1 %}
{% endmacro %}
@group(0) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> weights: array<u32>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
{% if norm %}
{{ bind("norm_weight") }}
{% endif %}
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

const lanes = {{ lanes }}u;
const share = {{ share }}u;
const contraction = {{ contraction }}u;
const columns = contraction; // of the weight matrix
const n_columns = {{ n_columns }}u; // of the output
const row_words = {{ row_words }}u;
const low_rank_scale = {{ scale }};

{% include "parts/matmul_row_quants.wgsl" %}
{% if gate %}
{% include "parts/activation.wgsl" %}
{% else %}
{% include "parts/matmul_epilogue.wgsl" %}
{% endif %}

{% set squares = norm %}
{% if share > 1 %}
var<workgroup> sums: array<vec4<f32>, {{ lanes * quads }}>; // [quad][lane]
{% if squares %}
var<workgroup> square_sums: array<f32, lanes>;
{% endif %}
{% endif %}

{# The lane's next n eights, the first of them at k; half_eight: the last four weights of an odd width. #}
{% macro add_eights(n, half_eight=False) %}
{% for s in range(n) %}
{% set k = "(k + " ~ 8 * s * share ~ "u)" if s else "k" %}
{% for half in ("a", "b") %}
{% set at = k ~ " / 4u" ~ (" + 1u" if half == "b" else "") %}
{% set last = half_eight and half == "b" %}
        let x{{ half }}_{{ s }} = {{ "vec4<f32>()" if last else "x[" ~ at ~ "]" }};
{% if norm and not last %}
        let v{{ half }}_{{ s }} = x{{ half }}_{{ s }} * norm_weight[{{ at }}];
{% else %}
        let v{{ half }}_{{ s }} = x{{ half }}_{{ s }};
{% endif %}
{% endfor %}
{% for q in range(quads) %}
{% for j in range(4) %}
        let w_{{ s }}_{{ q }}_{{ j }} = quants8(row_{{ q }} + {{ j }}u, {{ k }});
        let d_{{ s }}_{{ q }}_{{ j }} = scale8(row_{{ q }} + {{ j }}u, {{ k }});
{% endfor %}
{% endfor %}
{% endfor %}
{% for s in range(n) %}
{% if squares %}
        squares += dot(xa_{{ s }}, xa_{{ s }}) + dot(xb_{{ s }}, xb_{{ s }});
{% endif %}
        let spread_{{ s }} = spread(Eight(va_{{ s }}, vb_{{ s }}));
        let total_{{ s }} = dot(va_{{ s }}, vec4(1.0)) + dot(vb_{{ s }}, vec4(1.0));
{% for q in range(quads) %}
        sum_{{ q }} += vec4(
{% for j in range(4) %}
            scaled(dot(spread_{{ s }}.a, w_{{ s }}_{{ q }}_{{ j }}.a) + dot(spread_{{ s }}.b, w_{{ s }}_{{ q }}_{{ j }}.b), total_{{ s }}, d_{{ s }}_{{ q }}_{{ j }}),
{% endfor %}
        );
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
{% set width = 4 if gate else 4 * quads %}
    let first = ((group.x + group.y * groups.x) * lanes + lane) / share * {{ width }}u;
    // Lanes past the end compute the last columns once more and do not store them: barriers follow.
    let column = min(first, n_columns - {{ width }}u);
{% for q in range(quads) %}
    let row_{{ q }} = column + {{ q * (n_columns if gate else 4) }}u;
    var sum_{{ q }} = vec4<f32>();
{% endfor %}
{% if squares %}
    var squares = 0.0;
{% endif %}

{% for member in members %}
{% for q in range(quads) %}
    if (row_{{ q }} >= {{ member.start }}u && row_{{ q }} < {{ member.stop }}u) {
        let at = (row_{{ q }} - {{ member.start }}u + {{ member.factor_start }}u) * {{ rank // 4 }}u;
        for (var r = part; r < {{ rank // 4 }}u; r += share) {
            let z = low_rank_scale * low[{{ member.low_start // 4 }}u + r];
            sum_{{ q }} += vec4({% for j in range(4) %}dot(z, factor[at + {{ j * rank // 4 }}u + r]){{ ", " if j < 3 }}{% endfor %});
        }
    }
{% endfor %}
{% endfor %}

{# Every lane has `whole` eights, the first rounds × steps of them in rounds; some lanes have one more. #}
{% set whole = contraction // 8 // share %}
{% set rounds = whole // steps %}
{% set rest = whole % steps %}
{% if rounds > 1 %}
    for (var k = 8u * part; k < {{ 8 * share * rounds * steps }}u; k += {{ 8 * share * steps }}u) {
{{ add_eights(steps) }}
    }
{% elif rounds == 1 %}
    {
        let k = 8u * part;
{{ add_eights(steps) }}
    }
{% endif %}
{% if rest %}
    {
        let k = 8u * (part + {{ share * rounds * steps }}u);
{{ add_eights(rest) }}
    }
{% endif %}
{% set left = contraction // 8 - whole * share %}
{% if left %}
    if (part < {{ left }}u) {
        let k = 8u * (part + {{ share * whole }}u);
{{ add_eights(1) }}
    }
{% endif %}
{% if contraction % 8 %}
    if (part == {{ left }}u) {
        let k = {{ contraction // 8 * 8 }}u;
{{ add_eights(1, True) }}
    }
{% endif %}

{% if share > 1 %}
{# Level by level: sums of lanes past the first `width` join those of the lanes before. #}
{% set level = namespace(width=share) %}
{% for _ in range(8) %}
{% if level.width > 1 %}
{% set ways = [branches, level.width] | min %}
{% set width = level.width // ways %}
    if (part >= {{ width }}u && part < {{ level.width }}u) {
{% for q in range(quads) %}
        sums[{{ q * lanes }}u + lane] = sum_{{ q }};
{% endfor %}
{% if squares %}
        square_sums[lane] = squares;
{% endif %}
    }
    workgroupBarrier();
    if (part < {{ width }}u) {
{% for way in range(1, ways) %}
{% for q in range(quads) %}
        sum_{{ q }} += sums[{{ q * lanes + way * width }}u + lane];
{% endfor %}
{% if squares %}
        squares += square_sums[{{ way * width }}u + lane];
{% endif %}
{% endfor %}
    }
{% set level.width = width %}
{% endif %}
{% endfor %}
    if (part > 0u) { return; }
{% endif %}
    if (first >= n_columns) { return; }
{% if squares %}
    let rstd = inverseSqrt(squares / {{ contraction }}.0 + {{ epsilon }});
{% for q in range(quads) %}
    sum_{{ q }} *= rstd;
{% endfor %}
{% endif %}
{% if gate %}
{% if bias %}
    sum_0 += bias[row_0 / 4u];
    sum_1 += bias[row_1 / 4u];
{% endif %}
    out[column / 4u] = gate_value(sum_0) * sum_1;
{% else %}
{% for q in range(quads) %}
    let quad_{{ q }} = ({{ "place.out_column" if placed else "0u" }} + row_{{ q }}) / 4u;
    write_out(quad_{{ q }}, quad_{{ q }}, sum_{{ q }});
{% endfor %}
{% endif %}
}
