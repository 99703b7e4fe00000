// What a chunk of up to {{ chunk }} rows has without its state, as in delta_prepare.wgsl, on matrix units:
//   D[i, j] = exp(cum[i] − cum[j]),  j ≤ i;   A = strict lower part of beta[i] · D · k kᵀ;   T = (I + A)⁻¹
//   P = lower part of D · q kᵀ;   U = T · diag(beta) v;   W = T · diag(beta · exp(cum)) k
//
// Bindings: inputs, segments, mixes (T, P, whole rows), deltas (U, W are written) as there, all f32. One workgroup a block of
// rows and value head. Factors of products are f16, sums f32; D is f32, and so are A and T until T is a factor: what is wrong
// in a row of A goes through all later rows of T. A lane solves a column of T, its sums ascend.
{% import "parts/delta_fragments.wgsl" as parts with context %}
{% set eights = head_size // 8 %}
{% set line = chunk // 4 + 1 %}
{% set slice_line = slice // 4 + 1 %}
{% set square_size = chunk * line %}
{% set total = [2 * chunk * (eights + 1), square_size + chunk * (chunk // 8 + 1)] | max %}
{% set down = 2 * chunk // m // subgroups %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> segments: array<vec2<u32>>;

{% import "parts/delta.wgsl" as delta with context %}
{% include "parts/delta.wgsl" %}
const mix_scale = {{ mix_scale }}; // of T in f16: no number of it is above 1

// k and q; or a square of f32 (P; A, then T beside it), or a factor of T and what it gives, and behind them T as f16.
{{ parts.declare(total) }}

// D of a row, for four columns up to the diagonal.
fn decays(i: u32, js: vec4<u32>) -> vec4<f32> {
    return exp(min(vec4(cum[i]) - vec4(cum[js.x], cum[js.y], cum[js.z], cum[js.w]), vec4<f32>()));
}

{{ parts.entry() }}
    let block = index / heads;
    let head = index % heads;
    if (block * chunk >= extent.rows) { return; }
    let stacked_row = team * {{ down * m }}u;
    if (lane == 0u) {
        atomicStore(&largest[0], 0u);
        atomicStore(&largest[1], 0u);
    }
    var slot = 0u;
    var most = 0.0;
{% call delta.each_chunk() %}
        load_gates(first, n, head, lane);
        let head_at = head * quads;
    {{ parts.fetch("k", chunk, eights, "inputs", "key_at(first + row, head)") }}
    {{ parts.fetch("q", chunk, eights, "inputs", "query_at(first + row, head)") }}
    {{ parts.put("k", chunk, eights, 0) }}
    {{ parts.put("q", chunk, eights, chunk * (eights + 1)) }}
        workgroupBarrier();
    {{ parts.zero("sum", down, chunk // n) }}
    {{ parts.multiply("sum", down, chunk // n, ["0u", eights, "stacked_row", false], ["0u", eights, "0u", true], head_size) }}
        workgroupBarrier();
        if (team >= {{ subgroups // 2 }}u) {
    {{ parts.store("sum", down, chunk // n, [0, line, "(stacked_row - chunk)", "0u"]) }}
        }
        workgroupBarrier();
        for (var unit = lane; unit < n * (chunk / 4u); unit += lanes) {
            let i = unit / (chunk / 4u);
            let j = unit % (chunk / 4u);
            let js = vec4(4u * j) + vec4(0u, 1u, 2u, 3u);
            let p = decays(i, js) * bitcast<vec4<f32>>(tiles[i * {{ line }}u + j]);
            mixes[(first + i) * mix_stride + (heads + head) * (chunk / 4u) + j] = select(vec4<f32>(), p, js <= vec4(i));
        }
        workgroupBarrier();
        if (team < {{ subgroups // 2 }}u) {
    {{ parts.store("sum", down, chunk // n, [0, line, "stacked_row", "0u"]) }}
        }
        workgroupBarrier();
        for (var unit = lane; unit < chunk * chunk / 4u; unit += lanes) {
            let i = unit / (chunk / 4u);
            let at = i * {{ line }}u + unit % (chunk / 4u);
            let js = vec4(unit % (chunk / 4u) * 4u) + vec4(0u, 1u, 2u, 3u);
            let a = beta[i] * decays(i, js) * bitcast<vec4<f32>>(tiles[at]);
            let rest = select(vec4<f32>(), vec4(1.0), js == vec4(i));
            tiles[at] = bitcast<vec4<u32>>(select(rest, a, js < vec4(i)));
        }
        workgroupBarrier();
        // A column of T goes into the row of A's square above whose diagonal it begins: no lane waits for another.
        if (lane < chunk) {
            let own = lane * {{ line }}u;
            for (var i = lane + 1u; i < chunk; i += 1u) {
                var value = 0.0;
                var j = lane / 4u;
                for (; 4u * j + 4u <= i; j += 1u) {
                    let a = bitcast<vec4<f32>>(tiles[i * {{ line }}u + j]);
                    let js = vec4(4u * j) + vec4(0u, 1u, 2u, 3u);
                    let t = select(vec4<f32>(), bitcast<vec4<f32>>(tiles[own + j]), js >= vec4(lane));
                    value -= a.x * t.x;
                    value -= a.y * t.y;
                    value -= a.z * t.z;
                    value -= a.w * t.w;
                }
                for (var rest = max(4u * j, lane); rest < i; rest += 1u) {
                    let a = bitcast<f32>(tiles[i * {{ line }}u + rest / 4u][rest % 4u]);
                    value -= a * bitcast<f32>(tiles[own + rest / 4u][rest % 4u]);
                }
                tiles[own + i / 4u][i % 4u] = bitcast<u32>(value);
            }
        }
        workgroupBarrier();
        for (var unit = lane; unit < chunk * chunk / 8u; unit += lanes) {
            let i = unit % chunk;
            let j = unit / chunk;
{% for h in range(2) %}
            var t{{ h }} = vec4<f32>();
{% for s in range(4) %}
            if (8u * j + {{ 4 * h + s }}u <= i) { t{{ h }}[{{ s }}] = bitcast<f32>(tiles[(8u * j + {{ 4 * h + s }}u) * {{ line }}u + i / 4u][i % 4u]); }
{% endfor %}
{% endfor %}
            tiles[{{ square_size }}u + i * {{ chunk // 8 + 1 }}u + j] = packed(mix_scale * t0, mix_scale * t1);
            if (i < n) {
                let to = (first + i) * mix_stride + head * (chunk / 4u) + 2u * j;
                mixes[to] = t0;
                mixes[to + 1u] = t1;
            }
        }
        for (var turn = 0u; turn < {{ 2 * (head_size // slice) }}u; turn += 1u) {
            let part = turn % 2u; // U, W
            let column = turn / 2u * {{ slice // 4 }}u;
    {{ parts.scaled_tile("right", chunk, slice // 8, "inputs",
                         "select(value_at(first + row, head), key_at(first + row, head), part == 1u) + column", 0,
                         factor="(beta[row] * select(1.0, rise[row], part == 1u))") }}
    {{ parts.product(slice, ["%du" % square_size, chunk // 8, false], ["0u", slice // 8, false], chunk, 0) }}
            let back = unscaled(scale) / mix_scale;
            for (var unit = lane; unit < n * {{ slice // 4 }}u; unit += lanes) {
                let i = unit / {{ slice // 4 }}u;
                let j = unit % {{ slice // 4 }}u;
                deltas[((first + i) * 4u + 2u + part) * wide + head_at + column + j] =
                    back * bitcast<vec4<f32>>(tiles[i * {{ slice_line }}u + j]);
            }
        }
{% endcall %}
}
