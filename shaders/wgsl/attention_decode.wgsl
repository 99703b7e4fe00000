// out[m] = Σ_j p[m, j] v[j],   p[m, :] = softmax_j s[m, j],   over the cached keys j <= positions[m] and,
// where there is a window, positions[m] - j < window;
// s[m, j] = scale · q[m]·k[j], capped as cap · tanh(s / cap) where the model has a cap.
//
// Bindings: qkv [rows, stride] (only q is read), positions u32 [rows], keys [kv_size / 4, room] and
// values [room, kv_size / 4] of vec4 (see kv_store.wgsl), out [rows, n_heads · head_size].
// One workgroup a row and a head. Keys ascend in blocks of 64, counted from key 0: a lane
// scores one key, then adds four columns of every {{ [64 // (head_size // 4), 1] | max }}th v; these sums meet in order.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read> keys: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> values: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> out: array<vec4<f32>>;

{% set quads = head_size // 4 %}
{% set teams = [64 // quads, 1] | max %}
{% set turns = (quads + 63) // 64 %}
{# Heads of more than 256 numbers: a lane has the columns 4 · lane, 4 · (lane + 64) … of its one team. #}
{% macro at(t) %}lane{{ " + %du" % (64 * t) if t }}{% endmacro %}
{% macro guard(t) %}{{ "if (lane + %du < quads) " % (64 * t) if 64 * (t + 1) > quads }}{% endmacro %}
{% macro sum(t) %}sum{{ "_%d" % t if t }}{% endmacro %}
const lanes = 64u;
const quads = {{ quads }}u;
const teams = {{ teams }}u; // lanes of a team have the columns of the head among them
const lowest = -3.0e38; // below every score, and its own difference is 0 where -inf's is NaN

var<workgroup> query: array<vec4<f32>, {{ quads }}>;
var<workgroup> maxima: array<f32, 64>;
var<workgroup> weights: array<f32, 64>;
var<workgroup> sums: array<vec4<f32>, 64>;

{% include "parts/row_sum.wgsl" %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let head = index % {{ n_heads }}u;
    let row = index / {{ n_heads }}u;
    if (row >= extent.rows) { return; }
    let end = positions[row] + 1u;
    var seen_from = 0u; // the first key that the row sees
{% if window %}
    if (end > {{ window }}u) { seen_from = end - {{ window }}u; }
{% endif %}
    let first = seen_from / 64u * 64u;
    let last = end;
    let kv_head = head / {{ n_heads // n_kv_heads }}u;
{% for t in range(turns) %}
    {{ guard(t) if turns > 1 else "if (lane < quads) " }}{ query[{{ at(t) }}] = qkv[row * {{ stride }}u + head * quads + {{ at(t) }}]; }
{% endfor %}
    workgroupBarrier();

    let team = lane / quads;
    let column = kv_head * quads + lane % quads;
    var highest = lowest;
    var total = 0.0;
{% for t in range(turns) %}
    var {{ sum(t) }} = vec4<f32>();
{% endfor %}
    for (var block = first; block < last; block += 64u) {
        // A lane without a key repeats the last one, and gives it no weight.
        let key = min(block + lane, last - 1u);
        let seen = block + lane < last && key >= seen_from;
        var products = vec4<f32>();
        for (var c = 0u; c < quads; c += 1u) {
            products = fma(query[c], keys[(kv_head * quads + c) * {{ room }}u + key], products);
        }
        var score = products.x + products.y + products.z + products.w;
{% if softcap %}
        // Some drivers' tanh overflows; beyond ±10 it is ±1 in f32.
        score = {{ softcap }} * tanh(clamp(score * {{ scale / softcap }}, -10.0, 10.0));
{% else %}
        score *= {{ scale }};
{% endif %}
        maxima[lane] = select(lowest, score, seen);
        workgroupBarrier();
        for (var step = 32u; step > 0u; step /= 2u) {
            if (lane < step) { maxima[lane] = max(maxima[lane], maxima[lane + step]); }
            workgroupBarrier();
        }
        let before = highest;
        highest = max(before, maxima[0]);
        let shrink = exp(before - highest);
        let weight = select(0.0, exp(score - highest), seen);
        total = total * shrink + weight;
{% for t in range(turns) %}
        {{ sum(t) }} *= shrink;
{% endfor %}
        weights[lane] = weight;
        workgroupBarrier();
        if (team < teams) {
            let count = min(64u, last - block);
            for (var j = team; j < count; j += teams) {
{% for t in range(turns) %}
                {{ sum(t) }} += weights[j] * values[(block + j) * {{ n_kv_heads * quads }}u + column{{ " + %du" % (64 * t) if t }}];
{% endfor %}
            }
        }
    }

    let all = row_sum(total, lane);
{% if turns > 1 %}
    // Every lane has columns of its own: their sums are whole.
{% for t in range(turns) %}
    {{ guard(t) }}{ out[index * quads + {{ at(t) }}] = {{ sum(t) }} / all; }
{% endfor %}
{% else %}
    sums[lane] = sum;
    workgroupBarrier();
    if (lane >= quads) { return; }
    var result = sums[lane];
{% for t in range(1, teams) %}
    result += sums[lane + {{ t * quads }}u];
{% endfor %}
    out[index * quads + lane] = result / all;
{% endif %}
}
