// out[h] = Σ_s w[s] · partial[h, s] / Σ_s w[s] · total[s],   w[s] = exp(highest[s] - max_s highest[s]),
// over the stretches s of {{ keys }} keys that the row sees: the second pass of attention_decode_row.wgsl.
//
// Bindings: row u32 (the position at {{ position_at }}), partial [n_heads, splits, head_size / 4 + 1] of vec4, out
// [n_heads · head_size]{% if int_out %}, int_row u32 (out as whole numbers, int_row_store.wgsl){% endif %}. One workgroup a head: a lane adds four columns of every {{ teams }}th stretch, and
// these sums meet in order.

{% set quads = head_size // 4 %}
@group(0) @binding(0) var<storage, read> row: array<u32>;
@group(0) @binding(1) var<storage, read> partial: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<f32>>;
{% if int_out %}
@group(0) @binding(3) var<storage, read_write> int_row: array<u32>;
{% endif %}

const lanes = {{ lanes }}u;
const quads = {{ quads }}u;
const teams = {{ teams }}u;
const lowest = -3.0e38;

var<workgroup> sums: array<vec4<f32>, lanes>;

{% with reduction = "max" %}{% include "parts/row_sum.wgsl" %}{% endwith %}
{% with reduction = "sum" %}{% include "parts/row_sum.wgsl" %}{% endwith %}
{% if int_out %}
{% with int_blocks = n_heads * head_size // 32, int_quads = quads %}{% include "parts/int_row_store.wgsl" %}{% endwith %}
{% endif %}

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let head = group.x + group.y * groups.x;
    if (head >= {{ n_heads }}u) { return; }
    let position = row[{{ position_at }}u];
    var first = 0u;
{% if window %}
    if (position >= {{ window }}u) { first = (position - {{ window - 1 }}u) / {{ keys }}u; }
{% endif %}
    let end = position / {{ keys }}u + 1u;
    let base = head * {{ splits }}u;

    var mine = lowest;
    for (var s = first + lane; s < end; s += lanes) {
        mine = max(mine, partial[(base + s) * (quads + 1u) + quads].x);
    }
    let highest = row_max(mine, lane);
    var part = 0.0;
    for (var s = first + lane; s < end; s += lanes) {
        let stats = partial[(base + s) * (quads + 1u) + quads];
        part += exp(stats.x - highest) * stats.y;
    }
    let total = row_sum(part, lane);

    var sum = vec4<f32>();
    let team = lane / quads;
    if (team < teams) {
        for (var s = first + team; s < end; s += teams) {
            let at = (base + s) * (quads + 1u);
            sum += exp(partial[at + quads].x - highest) * partial[at + lane % quads];
        }
    }
    sums[lane] = sum;
    workgroupBarrier();
    var result = vec4<f32>();
    if (lane < quads) {
        result = sums[lane];
{% for t in range(1, teams) %}
        result += sums[lane + {{ t * quads }}u];
{% endfor %}
        result /= total;
        out[head * quads + lane] = result;
{% if int_out %}
        share_quad(lane, result, result);
{% endif %}
    }
{% if int_out %}
    workgroupBarrier();
    if (lane < quads) { store_quad(lane, head * quads + lane, result); }
{% endif %}
}
