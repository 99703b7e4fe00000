// out[m, h] = Σ_s w[s] · partial[m, h, s] / Σ_s w[s] · total[s],   w[s] = exp(highest[s] - max_s highest[s]),
// over the stretches s of {{ stretch }} keys that row m sees, in order: the second pass of attention_decode.wgsl.
//
// Bindings: positions u32 [rows], partial [rows, n_heads, splits, head_size], stats [rows, n_heads,
// splits] of (highest, total), out [rows, n_heads · head_size]. One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> positions: array<u32>;
@group(0) @binding(2) var<storage, read> partial: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> stats: array<vec2<f32>>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;

const quads = {{ head_size // 4 }}u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / {{ n_heads * (head_size // 4) }}u;
    if (row >= extent.rows) { return; }
    let end = positions[row] + 1u;
    var seen_from = 0u;
{% if window %}
    if (end > {{ window }}u) { seen_from = end - {{ window }}u; }
{% endif %}
    let base = index / quads * {{ splits }}u;
    let first = base + seen_from / {{ stretch }}u;
    let last = base + (end - 1u) / {{ stretch }}u;
    var highest = stats[first].x;
    for (var s = first + 1u; s <= last; s += 1u) { highest = max(highest, stats[s].x); }
    var sum = vec4<f32>();
    var total = 0.0;
    for (var s = first; s <= last; s += 1u) {
        let weight = exp(stats[s].x - highest);
        sum += weight * partial[s * quads + index % quads];
        total += weight * stats[s].y;
    }
    out[index] = sum / total;
}
