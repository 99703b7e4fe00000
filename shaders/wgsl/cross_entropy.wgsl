// losses[m] = logsumexp(logits[m]) − logits[m, labels[m]];  correct[m] = 1 where the label is the
// argmax (the lowest index wins a tie), else 0; with the gradient, in place:
//   logits[m, v] ← (softmax(logits[m])[v] − [v = label]) · weights[m],
// and where the logits are capped, cap · tanh(raw / cap), times the cap's slope 1 − (logit / cap)².
//
{% if smoothing %}
// Labels are smoothed: losses[m] = (1 − ε) · the above + ε · (logsumexp − mean_v logits[m, v]), ε = {{ smoothing }}, and
// (1 − ε) · [v = label] + ε / {{ vocab_size }} comes off the softmax.
{% endif %}
{% if dft %}
// With p of the label: losses[m] = p · the above, weights[m] · p for the weight.
{% endif %}
//
// Bindings: sums [chunk, {{ n_stretches }}, {{ 8 if smoothing else 4 }}] of cross_entropy_sums.wgsl, labels u32 [chunk], losses and
// correct [chunk]; with the gradient logits [chunk, {{ stride }}] (columns past {{ vocab_size }} stay) and weights
// [chunk], what each loss counts. The stretches' sums are added in order.
{% if halves %}
// The gradient is f16, and lies where the logits of its stretch did: {{ columns }} columns in the first half of their
// memory, as many that are stale, and so on. All of a stretch is read before any of it is written.
{% endif %}
{% if with_gradient %}
// One workgroup a row and stretch of {{ columns }} columns; its lanes take {{ quads }} quads at once, {{ lanes }} apart{{ ", two and two neighbours" if halves }}.
{% else %}
// One lane a row.
{% endif %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> sums: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> labels: array<u32>;
@group(0) @binding(3) var<storage, read_write> losses: array<f32>;
@group(0) @binding(4) var<storage, read_write> correct: array<f32>;
{% if with_gradient %}
@group(0) @binding(5) var<storage, read_write> logits: array<{{ "vec4<u32>" if halves else "vec4<f32>" }}>;
@group(0) @binding(6) var<storage, read> weights: array<f32>;
{% endif %}

{% set n_quads = (vocab_size + 3) // 4 %}
{# The gradient `to` the four logits `value` of a quad of columns. #}
{% macro gradient(to, value, quad, past) %}
            let place = 4u * ({{ quad }}) + vec4(0u, 1u, 2u, 3u);
            var d = exp({{ value }} - top) * factor - select(vec4(0.0), vec4(weight{{ " * %s" % (1.0 - smoothing) if smoothing }}), place == vec4(label)){{ " - weight * %s" % (smoothing / vocab_size) if smoothing }};
{% if softcap %}
            let capped = {{ value }} / {{ softcap }};
            d *= 1.0 - capped * capped;
{% endif %}
{% if vocab_size % 4 %}
            d = select({{ past }}, d, place < vec4({{ vocab_size }}u));
{% endif %}
            {{ to }} = d;
{% endmacro %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
{% if with_gradient %}
    let row = index / {{ n_stretches }}u;
    let stretch = index % {{ n_stretches }}u;
{% else %}
    let row = index * {{ lanes }}u + lane;
{% endif %}
    if (row >= extent.rows) { return; }
    let label = labels[row];
{% set step = 2 if smoothing else 1 %}
    let first = row * {{ step * n_stretches }}u;
    var top = sums[first].x;
    var before = sums[first].z;
    for (var s = {{ step }}u; s < {{ step * n_stretches }}u; s += {{ step }}u) {
        top = max(top, sums[first + s].x);
        before = max(before, sums[first + s].z);
    }
    var total = 0.0;
{% if smoothing %}
    var plain = 0.0;
{% endif %}
    for (var s = 0u; s < {{ step * n_stretches }}u; s += {{ step }}u) {
        total += sums[first + s].y * exp(sums[first + s].x - top);
{% if smoothing %}
        plain += sums[first + s + 1u].x;
{% endif %}
    }
    let own = sums[first + {{ "2u * " if smoothing }}(label / {{ columns }}u)].w;
    // The difference first: top + log(total) would be rounded at the size of the logits.
    let surprise = log(total) + (top - own);
{% if dft %}
    let share = exp(-surprise);
{% endif %}
{% if with_gradient %}
    if (stretch == 0u && lane == 0u)
{% endif %}
    {
{% if smoothing %}
        let spread = log(total) + (top - plain / {{ vocab_size }}.0);
        losses[row] = {{ 1.0 - smoothing }} * surprise + {{ smoothing }} * spread;
{% elif dft %}
        losses[row] = share * surprise;
{% else %}
        losses[row] = surprise;
{% endif %}
        correct[row] = select(0.0, 1.0, own == top && before < top);
    }
{% if with_gradient %}
    let weight = weights[row]{{ " * share" if dft }};
    let factor = weight / total;
    let base = row * {{ stride // 4 }}u;
{% if halves %}
    let first_quad = stretch * {{ columns // 4 }}u + 2u * lane;
{% for q in range(quads) %}
{% set at = "first_quad + %du" % (q // 2 * 2 * lanes + q % 2) %}
    var value_{{ q }} = vec4<f32>();
    let inside_{{ q }} = {{ at }} < {{ n_quads }}u;
    if (inside_{{ q }}) { value_{{ q }} = bitcast<vec4<f32>>(logits[base + {{ at }}]); }
{% endfor %}
    storageBarrier();
{% for q in range(quads) %}
{% set at = "first_quad + %du" % (q // 2 * 2 * lanes + q % 2) %}
    var d_{{ q }} = vec4<f32>();
    if (inside_{{ q }}) {
{{ gradient("d_%d" % q, "value_%d" % q, at, "vec4(0.0)") }}
    }
{% endfor %}
{% for q in range(0, quads, 2) %}
    if (inside_{{ q }}) {
        logits[base + stretch * {{ columns // 4 }}u + lane + {{ q // 2 * lanes }}u] = vec4(
            pack2x16float(d_{{ q }}.xy), pack2x16float(d_{{ q }}.zw), pack2x16float(d_{{ q + 1 }}.xy), pack2x16float(d_{{ q + 1 }}.zw),
        );
    }
{% endfor %}
{% else %}
    var quad = stretch * {{ columns // 4 }}u + lane;
{% if steps > 1 %}
    let last_quad = min((stretch + 1u) * {{ columns // 4 }}u, {{ n_quads }}u);
    for (; quad < last_quad; quad += {{ lanes * quads }}u)
{% endif %}
    {
{% for q in range(quads) %}
        var value_{{ q }} = vec4<f32>();
        let inside_{{ q }} = quad < {{ [n_quads - q * lanes, 0] | max }}u;
        if (inside_{{ q }}) { value_{{ q }} = logits[base + quad + {{ q * lanes }}u]; }
{% endfor %}
{% for q in range(quads) %}
        if (inside_{{ q }}) {
{{ gradient("logits[base + quad + %du]" % (q * lanes), "value_%d" % q, "quad + %du" % (q * lanes), "value_%d" % q) }}
        }
{% endfor %}
    }
{% endif %}
{% endif %}
}
