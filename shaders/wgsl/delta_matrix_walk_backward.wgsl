// Gradient of delta_matrix_walk.wgsl along an example's chunks, the last first, as in delta_walk_backward.wgsl:
//   d_v' = Pᵀ d_o + diag(exp(cum[last] − cum)) k G
//   G ← exp(cum[last]) G + (diag(exp(cum)) q)ᵀ d_o − Wᵀ d_v'
//
// Bindings: inputs, mixes (P), deltas (W), segments, d_deltas (d_o; d_v' is written after it), d_states as there, all f32.
// One workgroup a block of rows (for the examples that begin there), value head and {{ columns }} columns of v. Factors of products
// are f16; sums, G from chunk to chunk and all that is added to it are f32. A column's numbers depend on the columns of its
// workgroup alone through the power of two of their largest.
{% import "parts/delta_fragments.wgsl" as parts with context %}
{% set eights = head_size // 8 %}
{% set across = columns // 4 %}
{% set step = columns // 8 + 1 %}
{% set key_at = chunk * (chunk // 8 + 1) %}
{% set state_at = key_at + chunk * (eights + 1) %}
{% set half_state_at = state_at + head_size * across %}
{% set d_out_at = half_state_at + [head_size, chunk] | max * step %}
{% set total = d_out_at + chunk * step %}
{% set down = 2 * chunk // m // subgroups %}
{% set state_down = state_rows // m %}
{% set along = columns // n %}
{% set units = chunk * across %}
{% set state_units = head_size * across // 2 %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> d_deltas: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> d_states: array<vec4<f32>>;

{% include "parts/delta.wgsl" %}
const mix_scale = {{ mix_scale }}; // of P in f16: q is short

// P, later what comes out of products; k, then q, then W; G as f32; then G, later −d_v', and d_o as f16.
{{ parts.declare(total) }}

{{ parts.entry() }}
    let column = index % {{ head_size // columns }}u * {{ across }}u;
    let head = index / {{ head_size // columns }}u % heads;
    let block = index / {{ head_size // columns }}u / heads;
    if (block * chunk >= extent.rows) { return; }
    let block_end = min((block + 1u) * chunk, extent.rows);
    let stacked_row = team * {{ down * m }}u;
    let state_row = team * {{ state_rows }}u;
    let of_state = team < {{ head_size // state_rows }}u;
    var row = block * chunk;
    while (row < block_end) {
        let bounds = segments[row];
        let end = min(bounds.y, extent.rows);
        if (bounds.x != row) {
            row = end;
            continue;
        }
        for (var at = lane; at < {{ head_size * across }}u; at += lanes) {
            tiles[{{ state_at }}u + at] = vec4<u32>();
        }
        let count = (end - row + chunk - 1u) / chunk;
        for (var left = count; left > 0u; left -= 1u) {
            let first = row + (left - 1u) * chunk;
            let n = min(chunk, end - first);
            if (lane == 0u) { atomicStore(&largest[0], 0u); }
            load_gates(first, n, head, lane);
            let head_at = head * quads;
    {{ parts.fetch("mix", chunk, chunk // 8, "mixes", "(first + row) * mix_stride + (heads + head) * (chunk / 4u)", "mix_scale") }}
    {{ parts.fetch("key", chunk, eights, "inputs", "key_at(first + row, head)") }}
            var most = 0.0;
{% for u in range(parts.turns_of(units) | int) %}
            var d_{{ u }} = vec4<f32>();
            {{ parts.has_unit(u, units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let i = unit / {{ across }}u;
                if (i < n) { d_{{ u }} = d_deltas[(first + i) * 7u * wide + head_at + column + unit % {{ across }}u]; }
                most = largest_of(most, d_{{ u }});
            }
{% endfor %}
{% for u in range(parts.turns_of(state_units) | int) %}
            var g_{{ u }}_0 = vec4<f32>();
            var g_{{ u }}_1 = vec4<f32>();
            {{ parts.has_unit(u, state_units) }}
            {
{% for h in range(2) %}
                g_{{ u }}_{{ h }} = bitcast<vec4<f32>>(tiles[{{ state_at + h }}u + 2u * (lane + {{ u * parts.lanes }}u)]);
                most = largest_of(most, g_{{ u }}_{{ h }});
{% endfor %}
            }
{% endfor %}
            atomicMax(&largest[0], bitcast<u32>(most));
            workgroupBarrier();
            let scale = scale_of(atomicLoad(&largest[0]));
            let back = unscaled(scale);
    {{ parts.put("g", head_size, columns // 8, half_state_at, "scale") }}
{% for u in range(parts.turns_of(units) | int) %}
            {{ parts.has_unit(u, units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let to = {{ d_out_at }}u + unit / {{ across }}u * {{ step }}u + unit % {{ across }}u / 2u;
                tiles[to][2u * (unit % 2u)] = pack2x16float(scale * d_{{ u }}.xy);
                tiles[to][2u * (unit % 2u) + 1u] = pack2x16float(scale * d_{{ u }}.zw);
            }
{% endfor %}
    {{ parts.put("mix", chunk, chunk // 8, 0) }}
    {{ parts.put("key", chunk, eights, key_at) }}
            workgroupBarrier();

            // k G by half of the subgroups, Pᵀ d_o by the others.
    {{ parts.fetch("query", chunk, eights, "inputs", "query_at(first + row, head)", "rise[row]") }}
    {{ parts.zero("sum", down, along) }}
            if (team < {{ subgroups // 2 }}u) {
    {{ parts.multiply("sum", down, along, ["%du" % key_at, eights, "stacked_row", false],
                      ["%du" % half_state_at, columns // 8, "0u", false], head_size) }}
            } else {
    {{ parts.multiply("sum", down, along, ["0u", chunk // 8, "(stacked_row - chunk)", true],
                      ["%du" % d_out_at, columns // 8, "0u", false], chunk) }}
            }
            workgroupBarrier();
    {{ parts.store("sum", down, along, [0, across, "stacked_row", "0u"]) }}
    {{ parts.put("query", chunk, eights, key_at) }}
            workgroupBarrier();
    {{ parts.fetch("w", chunk, eights, "deltas", "((first + row) * 4u + 3u) * wide + head_at") }}
{% for u in range(parts.turns_of(units) | int) %}
            {{ parts.has_unit(u, units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let i = unit / {{ across }}u;
                let of_state = fall[i] * bitcast<vec4<f32>>(tiles[unit]);
                let of_out = 1.0 / mix_scale * bitcast<vec4<f32>>(tiles[{{ units }}u + unit]);
                let d_v = select(vec4<f32>(), of_state + of_out, i < n); // scaled
                if (i < n) { d_deltas[((first + i) * 7u + 1u) * wide + head_at + column + unit % {{ across }}u] = back * d_v; }
                let to = {{ half_state_at }}u + i * {{ step }}u + unit % {{ across }}u / 2u;
                tiles[to][2u * (unit % 2u)] = pack2x16float(-d_v.xy);
                tiles[to][2u * (unit % 2u) + 1u] = pack2x16float(-d_v.zw);
            }
{% endfor %}
            if (left > 1u) { // nothing comes before the first
                let decay = scale * rise[n - 1u];
{% for u in range(parts.turns_of(state_units) | int) %}
                {{ parts.has_unit(u, state_units) }}
                {
                    let unit = {{ state_at }}u + 2u * (lane + {{ u * parts.lanes }}u);
                    tiles[unit] = bitcast<vec4<u32>>(decay * g_{{ u }}_0);
                    tiles[unit + 1u] = bitcast<vec4<u32>>(decay * g_{{ u }}_1);
                }
{% endfor %}
                workgroupBarrier();
    {{ parts.zero("held", state_down, along) }}
                if (of_state) {
    {{ parts.load("held", state_down, along, [state_at, across, "state_row", "0u"]) }}
    {{ parts.multiply("held", state_down, along, ["%du" % key_at, eights, "state_row", true],
                      ["%du" % d_out_at, columns // 8, "0u", false], chunk) }}
                }
                workgroupBarrier();
    {{ parts.put("w", chunk, eights, key_at) }}
                workgroupBarrier();
                if (of_state) {
    {{ parts.multiply("held", state_down, along, ["%du" % key_at, eights, "state_row", true],
                      ["%du" % half_state_at, columns // 8, "0u", false], chunk) }}
    {{ parts.store("held", state_down, along, [state_at, across, "state_row", "0u"]) }}
                }
                workgroupBarrier();
                let of_chunk = (first / chunk * heads + head) * 4u * quads * quads + column;
{% for u in range(parts.turns_of(state_units) | int) %}
                {{ parts.has_unit(u, state_units) }}
                {
                    let unit = lane + {{ u * parts.lanes }}u;
                    let to = of_chunk + unit / {{ across // 2 }}u * quads + unit % {{ across // 2 }}u * 2u;
{% for h in range(2) %}
                    let g{{ h }} = back * bitcast<vec4<f32>>(tiles[{{ state_at + h }}u + 2u * unit]);
                    tiles[{{ state_at + h }}u + 2u * unit] = bitcast<vec4<u32>>(g{{ h }});
                    d_states[to + {{ h }}u] = g{{ h }};
{% endfor %}
                }
{% endfor %}
            }
        }
        workgroupBarrier();
        row = end;
    }
}
