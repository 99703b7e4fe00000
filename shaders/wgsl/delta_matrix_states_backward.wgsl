// The part of the gradient of the gated delta rule that takes states, as in delta_chunk_backward.wgsl, on matrix units; S is the
// state at a chunk's start, S⁺ that at its end, G the gradient to S⁺:
//   R = d_o Sᵀ,  Y = v' Gᵀ,  d_W = −d_v' Sᵀ,  ⟨G, S⁺⟩
//
// Bindings as there, all f32: of d_deltas R, Y and d_W are written; d_gates [rows, 2 · heads] holds ⟨G, S⁺⟩ as d_g of a chunk's last
// row until delta_matrix_chunk_backward.wgsl has it. One workgroup a block of rows and value head, for the chunks that begin
// there. Factors of products are f16, each tile of them by the power of two of its largest; sums are f32.
{% import "parts/delta_fragments.wgsl" as parts with context %}
{% set eights = head_size // 8 %}
{% set row_size = chunk * (eights + 1) %}
{% set slice_line = slice // 4 + 1 %}
{% set total = row_size + [slice * (eights + 1), chunk * slice_line] | max %}

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> deltas: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> d_deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> states: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> d_states: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read_write> d_gates: array<f32>;

{% import "parts/delta.wgsl" as delta with context %}
const chunk = {{ chunk }}u;
const heads = {{ value_heads }}u;
const quads = {{ head_size // 4 }}u; // of a head
const wide = heads * quads;
const lanes = {{ lanes }}u;
var<workgroup> sums: array<f32, lanes>;

// Rows, and a state, which becomes what they give.
{{ parts.declare(total) }}

{# part `to` of d_deltas = sign · (the tile at 0, of all columns) · a stateᵀ. #}
{% macro with_states(to, sign, buffer, base) %}
            for (var at = 0u; at < {{ head_size }}u; at += {{ slice }}u) {
    {{ parts.scaled_tile("right", slice, eights, buffer, "%s + (row + at) * quads" % base, row_size, all_rows=true) }}
    {{ parts.product(slice, ["0u", eights, false], ["%du" % row_size, eights, true], head_size, row_size) }}
                let back = {{ sign }}(unscaled(left_scale) * unscaled(scale));
                for (var unit = lane; unit < n * {{ slice // 4 }}u; unit += lanes) {
                    let i = unit / {{ slice // 4 }}u;
                    let j = unit % {{ slice // 4 }}u;
                    d_deltas[((first + i) * 7u + {{ to }}) * wide + head_at + at / 4u + j] =
                        back * bitcast<vec4<f32>>(tiles[{{ row_size }}u + i * {{ slice_line }}u + j]);
                }
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
    workgroupBarrier();
    var slot = 0u;
    var most = 0.0;
{% call delta.each_chunk() %}
        let head_at = head * quads;
        let before = (first / chunk * heads + head) * 4u * quads * quads;
        let after = ((first + chunk) / chunk * heads + head) * 4u * quads * quads;
        if (first > start) {
            for (var part = 0u; part < 2u; part += 1u) { // d_o and R, d_v' and d_W
    {{ parts.scaled_tile("left", chunk, eights, "d_deltas", "((first + row) * 7u + part) * wide + head_at", 0, "left_scale") }}
                workgroupBarrier();
    {{ with_states("2u + 2u * part", "select(1.0, -1.0, part == 1u) * ", "states", "before") }}
            }
        } else {
            for (var unit = lane; unit < n * quads; unit += lanes) {
                let own = (first + unit / quads) * 7u * wide + head_at + unit % quads;
                d_deltas[own + 2u * wide] = vec4<f32>();
                d_deltas[own + 4u * wide] = vec4<f32>();
            }
        }
        if (first + chunk < end) {
    {{ parts.scaled_tile("left", chunk, eights, "deltas", "((first + row) * 4u + 1u) * wide + head_at", 0, "left_scale") }}
            workgroupBarrier();
    {{ with_states("3u", "", "d_states", "after") }}
            var inner = vec4<f32>();
            for (var at = lane; at < 4u * quads * quads; at += lanes) {
                inner += states[after + at] * d_states[after + at];
            }
            sums[lane] = dot(inner, vec4(1.0));
            workgroupBarrier();
            var sum = 0.0;
            if (lane < 16u) {
                for (var i = 0u; i < lanes / 16u; i += 1u) { sum += sums[lane * (lanes / 16u) + i]; }
            }
            workgroupBarrier();
            if (lane < 16u) { sums[lane] = sum; }
            workgroupBarrier();
            if (lane == 0u) {
                sum = {% for i in range(16) %}{{ " + " if i }}sums[{{ i }}]{% endfor %};
                d_gates[(first + n - 1u) * 2u * heads + head] = sum;
            }
            workgroupBarrier();
        } else {
            for (var unit = lane; unit < n * quads; unit += lanes) {
                d_deltas[((first + unit / quads) * 7u + 3u) * wide + head_at + unit % quads] = vec4<f32>();
            }
            if (lane == 0u) { d_gates[(first + n - 1u) * 2u * heads + head] = 0.0; }
        }
{% endcall %}
}
