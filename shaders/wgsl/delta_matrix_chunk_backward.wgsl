// What is left of the gradient of the gated delta rule, as in delta_chunk_backward.wgsl, on matrix units, once
// delta_matrix_states_backward.wgsl has R, Y, d_W and ⟨G, S⁺⟩. With β in M, and H' for β H:
//   b_u = Tᵀ d_v',  b_w = Tᵀ d_W
//   M = −strict lower part of β · (b_u Uᵀ + b_w Wᵀ) · D,   E = lower part of (d_o v'ᵀ) · D
//   d_q = E k + exp(cum) R;   H' = M k + β exp(cum) b_w,   F = Eᵀ q + Mᵀ k + exp(cum[last] − cum) Y
//   d_k = H' + F;   d_v = β b_u;   d_beta = b_u·v + k·H' / β
//   d_cum = q·d_q + k·(H' − F), of the last row + ⟨G, S⁺⟩;   d_g = the sum of d_cum from a row on
//
// Bindings as there, all f32; mixes (T) is read alone. One workgroup a block of rows and value head, for the chunks that begin
// there. Factors of products are f16, each tile of them by the power of two of its largest; sums and D are f32. q and k are in
// d_cum as the products with E and M have them, rounded: what a row gives and what it takes then cancel as they should.
{% import "parts/delta_fragments.wgsl" as parts with context %}
{% set eights = head_size // 8 %}
{% set row_size = chunk * (eights + 1) %}
{% set mix_size = chunk * (chunk // 8 + 1) %}
{% set line = chunk // 4 + 1 %}
{% set slice_line = slice // 4 + 1 %}
{% set narrow = [slice, 32] | min %}
{% set narrow_size = chunk * (narrow // 8 + 1) %}
{% set narrow_line = narrow // 4 + 1 %}
{% set total = [2 * row_size, chunk * line, mix_size + chunk * slice_line,
                2 * mix_size + [2 * narrow_size, chunk * narrow_line] | max] | max %}
{% set narrow_along = parts.along_of(narrow) | int %}
{% set per_row = parts.lanes // chunk %}
{% set of_its_lanes %}
{% for i in range(per_row) %}{{ " + " if i }}sums[{{ per_row }}u * lane + {{ i }}u]{% endfor %}
{% endset %}
{% set square_turns = parts.turns_of(chunk * chunk // 4) | int %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> d_deltas: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> d_gates: array<f32>;

{% import "parts/delta.wgsl" as delta with context %}
{% include "parts/delta.wgsl" %}
const mix_scale = {{ mix_scale }}; // of T in f16: no number of it is above 1
var<workgroup> sums: array<f32, lanes>;
var<workgroup> d_cum: array<f32, chunk>;

// Two factors, one of which becomes what they give; later M and E, and behind them k and q or what they give.
{{ parts.declare(total) }}

{% from "parts/unpacked.wgsl" import unpacking %}
{{ unpacking() }}
{# What comes out for a row and four columns of a slice is `x`, and goes where `use` says. #}
{% macro narrow_out(sums, use) %}
            workgroupBarrier();
            {{ parts.team_works(narrow) }}
            {
    {{ parts.store(sums, 1, narrow_along, [2 * mix_size, narrow_line, parts.team_row(), parts.team_column(narrow)]) }}
            }
            workgroupBarrier();
            for (var unit = lane; unit < n * {{ narrow // 4 }}u; unit += lanes) {
                let i = unit / {{ narrow // 4 }}u;
                let j = unit % {{ narrow // 4 }}u;
                let x = back * bitcast<vec4<f32>>(tiles[{{ 2 * mix_size }}u + i * {{ narrow_line }}u + j]);
                let own = ((first + i) * 7u) * wide + head_at + column + j;
{{ use }}
            }
{% endmacro %}

{{ parts.entry() }}
    let block = index / heads;
    let head = index % heads;
    if (block * chunk >= extent.rows) { return; }
    if (lane == 0u) {
        atomicStore(&largest[0], 0u);
        atomicStore(&largest[1], 0u);
    }
    var slot = 0u;
    var most = 0.0;
{% call delta.each_chunk() %}
        load_gates(first, n, head, lane);
        let head_at = head * quads;
        {
    {{ parts.fetch("inverse", chunk, chunk // 8, "mixes", "(first + row) * mix_stride + head * (chunk / 4u)", "mix_scale") }}
    {{ parts.put("inverse", chunk, chunk // 8, 0) }}
        }
        for (var turn = 0u; turn < {{ 2 * (head_size // slice) }}u; turn += 1u) {
            let part = turn % 2u; // d_v' and b_u, d_W and b_w
            let column = turn / 2u * {{ slice // 4 }}u;
    {{ parts.scaled_tile("right", chunk, slice // 8, "d_deltas", "((first + row) * 7u + 1u + 3u * part) * wide + head_at + column",
                         mix_size) }}
    {{ parts.product(slice, ["0u", chunk // 8, true], ["%du" % mix_size, slice // 8, false], chunk, mix_size) }}
            let back = unscaled(scale) / mix_scale;
            for (var unit = lane; unit < n * {{ slice // 4 }}u; unit += lanes) {
                let i = unit / {{ slice // 4 }}u;
                let j = unit % {{ slice // 4 }}u;
                d_deltas[((first + i) * 7u + 5u + part) * wide + head_at + column + j] =
                    back * bitcast<vec4<f32>>(tiles[{{ mix_size }}u + i * {{ slice_line }}u + j]);
            }
        }
        workgroupBarrier();
        storageBarrier();

{% for u in range(square_turns) %}
        var e_{{ u }} = vec4<f32>();
        var m_{{ u }} = vec4<f32>();
{% endfor %}
        for (var part = 0u; part < 3u; part += 1u) { // d_o and v', b_u and U, b_w and W
            let of_left = part + select(4u, 0u, part == 0u);
    {{ parts.scaled_tile("left", chunk, eights, "d_deltas", "((first + row) * 7u + of_left) * wide + head_at", 0, "left_scale") }}
            workgroupBarrier();
    {{ parts.scaled_tile("right", chunk, eights, "deltas", "((first + row) * 4u + 1u + part) * wide + head_at", row_size) }}
    {{ parts.product(chunk, ["0u", eights, false], ["%du" % row_size, eights, true], head_size, 0) }}
            let back = unscaled(left_scale) * unscaled(scale);
{% for u in range(square_turns) %}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let x = back * bitcast<vec4<f32>>(tiles[unit / (chunk / 4u) * {{ line }}u + unit % (chunk / 4u)]);
                if (part == 0u) { e_{{ u }} = x; } else { m_{{ u }} += x; }
            }
{% endfor %}
        }
        most = 0.0;
{% for u in range(square_turns) %}
        {
            let unit = lane + {{ u * parts.lanes }}u;
            let i = unit / (chunk / 4u);
            let js = vec4(unit % (chunk / 4u) * 4u) + vec4(0u, 1u, 2u, 3u);
            let cums = vec4(cum[js.x], cum[js.y], cum[js.z], cum[js.w]);
            let decay = exp(min(vec4(cum[i]) - cums, vec4<f32>()));
            e_{{ u }} = select(vec4<f32>(), decay * e_{{ u }}, js <= vec4(i));
            m_{{ u }} = select(vec4<f32>(), -beta[i] * decay * m_{{ u }}, js < vec4(i));
            most = largest_of(largest_of(most, e_{{ u }}), m_{{ u }});
        }
{% endfor %}
    {{ parts.agree("square_scale") }}
        let back = unscaled(square_scale);
{% for u in range(square_turns) %}
        {
            let unit = lane + {{ u * parts.lanes }}u;
            let to = unit / (chunk / 4u) * {{ chunk // 8 + 1 }}u + unit % (chunk / 4u) / 2u;
{% for square in ("m", "e") %}
            tiles[{{ loop.index0 * mix_size }}u + to][2u * (unit % 2u)] = pack2x16float(square_scale * {{ square }}_{{ u }}.xy);
            tiles[{{ loop.index0 * mix_size }}u + to][2u * (unit % 2u) + 1u] = pack2x16float(square_scale * {{ square }}_{{ u }}.zw);
{% endfor %}
        }
{% endfor %}

        for (var column = 0u; column < quads; column += {{ narrow // 4 }}u) {
    {{ parts.fetch("key", chunk, narrow // 8, "inputs", "key_at(first + row, head) + column") }}
    {{ parts.fetch("query", chunk, narrow // 8, "inputs", "query_at(first + row, head) + column") }}
            workgroupBarrier();
    {{ parts.put("key", chunk, narrow // 8, 2 * mix_size) }}
    {{ parts.put("query", chunk, narrow // 8, 2 * mix_size + narrow_size) }}
            workgroupBarrier();
    {{ parts.zero("d_q", 1, narrow_along) }}
    {{ parts.zero("h", 1, narrow_along) }}
    {{ parts.zero("f", 1, narrow_along) }}
            {{ parts.team_works(narrow) }}
            {
{% set right = ["%du" % (2 * mix_size), narrow // 8, parts.team_column(narrow), false] %}
    {{ parts.multiply("d_q", 1, narrow_along, ["%du" % mix_size, chunk // 8, parts.team_row(), false], right, chunk) }}
    {{ parts.multiply("h", 1, narrow_along, ["0u", chunk // 8, parts.team_row(), false], right, chunk) }}
    {{ parts.multiply("f", 1, narrow_along, ["0u", chunk // 8, parts.team_row(), true], right, chunk) }}
{% set right = ["%du" % (2 * mix_size + narrow_size), narrow // 8, parts.team_column(narrow), false] %}
    {{ parts.multiply("f", 1, narrow_along, ["%du" % mix_size, chunk // 8, parts.team_row(), true], right, chunk) }}
            }
    {{ narrow_out("d_q", "                d_deltas[own + 2u * wide] = x + rise[i] * d_deltas[own + 2u * wide];") }}
    {{ narrow_out("h", "                d_deltas[own + 6u * wide] = x + beta[i] * rise[i] * d_deltas[own + 6u * wide];") }}
    {{ narrow_out("f", "                d_deltas[own + 3u * wide] = x + fall[i] * d_deltas[own + 3u * wide];") }}
        }
        workgroupBarrier();
        storageBarrier();

        // {{ per_row }} lanes a row.
        let of_row = lane / {{ per_row }}u;
        var kh = 0.0;
        var others = vec2<f32>(); // of d_cum, of d_beta
        if (of_row < n) {
            let own = (first + of_row) * 7u * wide + head_at;
            let query = query_at(first + of_row, head);
            let key = key_at(first + of_row, head);
            let value = value_at(first + of_row, head);
            for (var x = lane % {{ per_row }}u; x < quads; x += {{ per_row }}u) {
                let k = rounded(inputs[key + x]);
                let h = d_deltas[own + 6u * wide + x];
                let f = d_deltas[own + 3u * wide + x];
                let b_u = d_deltas[own + 5u * wide + x];
                kh += dot(k, h);
                others.x += dot(rounded(inputs[query + x]), d_deltas[own + 2u * wide + x]) - dot(k, f);
                others.y += dot(inputs[value + x], b_u);
                d_deltas[own + 3u * wide + x] = h + f;
                d_deltas[own + 5u * wide + x] = beta[of_row] * b_u;
            }
        }
        sums[lane] = kh + others.x;
        workgroupBarrier();
        if (lane < chunk) {
            var d = {{ of_its_lanes | trim }};
            if (lane == n - 1u) { d += d_gates[(first + lane) * 2u * heads + head]; }
            d_cum[lane] = d;
        }
        workgroupBarrier();
        sums[lane] = kh / max(beta[of_row], 1e-30) + others.y;
        workgroupBarrier();
        if (lane < n) {
            let d_beta = {{ of_its_lanes | trim }};
            d_gates[(first + lane) * 2u * heads + heads + head] = d_beta;
        }
        if (lane < chunk / 8u) {
            eighths[lane] = {% for i in range(8) %}{{ " + " if i }}d_cum[8u * lane + {{ i }}u]{% endfor %};
        }
        workgroupBarrier();
        if (lane < n) {
            var d = 0.0;
{% for i in range(8) %}
            d += select(0.0, d_cum[lane / 8u * 8u + {{ i }}u], {{ i }}u >= lane % 8u);
{% endfor %}
{% for e in range(chunk // 8) %}
            d += select(0.0, eighths[{{ e }}], {{ e }}u > lane / 8u);
{% endfor %}
            d_gates[(first + lane) * 2u * heads + head] = d;
        }
{% endcall %}
}
