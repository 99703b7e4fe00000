// The gated delta rule over an example's chunks as in delta_walk.wgsl, on matrix units:
//   v' = U − W S;   o = diag(exp(cum)) q S + P v';   S ← exp(cum[last]) S + (diag(exp(cum[last] − cum)) k)ᵀ v'
//
// Bindings: inputs, mixes (P), deltas (U, W; o and v' are written), states, segments as there, all f32.
// One workgroup a block of rows (for the examples that begin there), value head and {{ columns }} columns of v. Factors of products
// are f16; sums, S from chunk to chunk and all that is added to it are f32. W and q lie one under the other, and so do what
// they give of S. A column's numbers depend on the columns of its workgroup alone through the power of two of their largest.
{% import "parts/delta_fragments.wgsl" as parts with context %}
{% set eights = head_size // 8 %}
{% set across = columns // 4 %}
{% set depth = head_size // 2 if head_size // 2 % k == 0 else head_size %}
{% set slices = head_size // depth %}
{% set slice_size = chunk * (depth // 8 + 1) %}
{% set mix_size = chunk * (chunk // 8 + 1) %}
{% set key_size = chunk * (eights + 1) %}
{% set state_at = [2 * slice_size, mix_size + key_size, 2 * chunk * across] | max %}
{% set half_state_at = state_at + head_size * across %}
{% set total = half_state_at + [head_size, chunk] | max * (columns // 8 + 1) %}
{% set down = 2 * chunk // m // subgroups %}
{% set state_down = state_rows // m %}
{% set along = columns // n %}
{% set units = chunk * across %}
{% set state_units = head_size * across // 2 %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> states: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> segments: array<vec2<u32>>;

{% include "parts/delta.wgsl" %}
const mix_scale = {{ mix_scale }}; // of P in f16: q is short

// A slice of W and of q, or P and k, or what comes out of products; then S as f32; then S, and later v', as f16.
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
        for (var first = row; first < end; first += chunk) {
            let n = min(chunk, end - first);
            if (lane == 0u) { atomicStore(&largest[0], 0u); }
            load_gates(first, n, head, lane);
            let head_at = head * quads;
    {{ parts.fetch("w", chunk, depth // 8, "deltas", "((first + row) * 4u + 3u) * wide + head_at") }}
    {{ parts.fetch("q", chunk, depth // 8, "inputs", "query_at(first + row, head)") }}
            var most = 0.0;
{% for u in range(parts.turns_of(units) | int) %}
            var u_{{ u }} = vec4<f32>();
            {{ parts.has_unit(u, units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let i = unit / {{ across }}u;
                if (i < n) { u_{{ u }} = deltas[((first + i) * 4u + 2u) * wide + head_at + column + unit % {{ across }}u]; }
                most = largest_of(most, u_{{ u }});
            }
{% endfor %}
            let state = (first / chunk * heads + head) * 4u * quads * quads + column;
{% for u in range(parts.turns_of(state_units) | int) %}
            var s_{{ u }}_0 = vec4<f32>();
            var s_{{ u }}_1 = vec4<f32>();
            {{ parts.has_unit(u, state_units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let to = state + unit / {{ across // 2 }}u * quads + unit % {{ across // 2 }}u * 2u;
{% for h in range(2) %}
                s_{{ u }}_{{ h }} = bitcast<vec4<f32>>(tiles[{{ state_at + h }}u + 2u * unit]);
                most = largest_of(most, s_{{ u }}_{{ h }});
                if (first > row) { states[to + {{ h }}u] = s_{{ u }}_{{ h }}; }
{% endfor %}
            }
{% endfor %}
            atomicMax(&largest[0], bitcast<u32>(most));
            workgroupBarrier();
            let scale = scale_of(atomicLoad(&largest[0]));
            let back = unscaled(scale);
    {{ parts.put("s", head_size, columns // 8, half_state_at, "scale") }}
    {{ parts.put("w", chunk, depth // 8, 0) }}
    {{ parts.put("q", chunk, depth // 8, slice_size) }}
            workgroupBarrier();

            // W S and q S.
    {{ parts.zero("sum", down, along) }}
{% for slice in range(slices) %}
{% if slice + 1 < slices %}
    {{ parts.fetch("w%d" % slice, chunk, depth // 8, "deltas", "((first + row) * 4u + 3u) * wide + head_at + %du" % ((slice + 1) * depth // 4)) }}
    {{ parts.fetch("q%d" % slice, chunk, depth // 8, "inputs", "query_at(first + row, head) + %du" % ((slice + 1) * depth // 4)) }}
{% else %}
    {{ parts.fetch("mix", chunk, chunk // 8, "mixes", "(first + row) * mix_stride + (heads + head) * (chunk / 4u)", "mix_scale") }}
    {{ parts.fetch("key", chunk, eights, "inputs", "key_at(first + row, head)", "fall[row]") }}
{% endif %}
    {{ parts.multiply("sum", down, along, ["0u", depth // 8, "stacked_row", false],
                      ["%du" % (half_state_at + slice * depth * (columns // 8 + 1)), columns // 8, "0u", false], depth) }}
            workgroupBarrier();
{% if slice + 1 < slices %}
    {{ parts.put("w%d" % slice, chunk, depth // 8, 0) }}
    {{ parts.put("q%d" % slice, chunk, depth // 8, slice_size) }}
            workgroupBarrier();
{% endif %}
{% endfor %}
    {{ parts.store("sum", down, along, [0, across, "stacked_row", "0u"]) }}
            workgroupBarrier();
{% for u in range(parts.turns_of(units) | int) %}
            {{ parts.has_unit(u, units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let i = unit / {{ across }}u;
                let j = unit % {{ across }}u;
                let v = select(vec4<f32>(), u_{{ u }} - back * bitcast<vec4<f32>>(tiles[unit]), i < n);
                if (i < n) { deltas[((first + i) * 4u + 1u) * wide + head_at + column + j] = v; }
                let to = {{ half_state_at }}u + i * {{ columns // 8 + 1 }}u + j / 2u;
                tiles[to][2u * (j % 2u)] = pack2x16float(scale * v.xy);
                tiles[to][2u * (j % 2u) + 1u] = pack2x16float(scale * v.zw);
                let o = bitcast<vec4<f32>>(tiles[{{ units }}u + unit]);
                tiles[{{ units }}u + unit] = bitcast<vec4<u32>>(mix_scale * rise[i] * o);
            }
{% endfor %}
            let decay = scale * rise[n - 1u];
{% for u in range(parts.turns_of(state_units) | int) %}
            {{ parts.has_unit(u, state_units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                tiles[{{ state_at }}u + 2u * unit] = bitcast<vec4<u32>>(decay * s_{{ u }}_0);
                tiles[{{ state_at + 1 }}u + 2u * unit] = bitcast<vec4<u32>>(decay * s_{{ u }}_1);
            }
{% endfor %}
            workgroupBarrier();

            // o, to which P v' is added, and S.
            if (team >= {{ subgroups // 2 }}u) {
    {{ parts.load("sum", down, along, [0, across, "stacked_row", "0u"]) }}
            }
    {{ parts.zero("held", state_down, along) }}
            if (of_state) {
    {{ parts.load("held", state_down, along, [state_at, across, "state_row", "0u"]) }}
            }
            workgroupBarrier();
    {{ parts.put("mix", chunk, chunk // 8, 0) }}
    {{ parts.put("key", chunk, eights, mix_size) }}
            workgroupBarrier();
            if (team >= {{ subgroups // 2 }}u) {
    {{ parts.multiply("sum", down, along, ["0u", chunk // 8, "(stacked_row - chunk)", false],
                      ["%du" % half_state_at, columns // 8, "0u", false], chunk) }}
            }
            if (of_state) {
    {{ parts.multiply("held", state_down, along, ["%du" % mix_size, eights, "state_row", true],
                      ["%du" % half_state_at, columns // 8, "0u", false], chunk) }}
    {{ parts.store("held", state_down, along, [state_at, across, "state_row", "0u"]) }}
            }
            workgroupBarrier();
            if (team >= {{ subgroups // 2 }}u) {
    {{ parts.store("sum", down, along, [0, across, "stacked_row", "0u"]) }}
            }
            workgroupBarrier();
{% for u in range(parts.turns_of(units) | int) %}
            {{ parts.has_unit(u, units) }}
            {
                let unit = lane + {{ u * parts.lanes }}u;
                let i = unit / {{ across }}u;
                let o = back / mix_scale * bitcast<vec4<f32>>(tiles[{{ units }}u + unit]);
                if (i < n) { deltas[(first + i) * 4u * wide + head_at + column + unit % {{ across }}u] = o; }
            }
{% endfor %}
{% for u in range(parts.turns_of(state_units) | int) %}
            {{ parts.has_unit(u, state_units) }}
            {
                let unit = {{ state_at }}u + 2u * (lane + {{ u * parts.lanes }}u);
                tiles[unit] = bitcast<vec4<u32>>(back * bitcast<vec4<f32>>(tiles[unit]));
                tiles[unit + 1u] = bitcast<vec4<u32>>(back * bitcast<vec4<f32>>(tiles[unit + 1u]));
            }
{% endfor %}
        }
        workgroupBarrier();
        row = end;
    }
}
