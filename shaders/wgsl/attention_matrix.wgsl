// Attention as in attention.wgsl, on matrix units: out[i] = Σ_j p[i, j] v[j], p[i, :] = softmax_j s[i, j],
// lse[i] = log Σ_j exp s[i, j], s[i, j] = scale · q[i]·k[j], capped where the model has a cap, over the
// rows j of i's example with j <= i and, where there is a window, i - j < window.
//
// Bindings, f16 in eights: qkv [rows, (n_heads + 2 n_kv_heads) head_size], out [rows, n_heads head_size];
// segments [rows, 2] (first row and end of the row's example), lse [rows, n_heads].
{% if cached %}
// Of a text's new rows, which see the keys of all rows before them: q, and k and v [room, 2 n_kv_heads head_size] from row
// {{ keys_at }} of eights on, lie in halves, each head multiplied by a power of two as sizes [n_heads + 2 n_kv_heads] says
// (head_halves.wgsl); positions [rows] ascend by one; out is f32, and there is no lse.
{% endif %}
// One workgroup a head and block of {{ block }} query rows, example by example; keys ascend in steps of {{ walk }}
// counted from the example's first row. Products of f16 are exact, their sums f32 in the units' order;
// weights are f16. Fragments can't be scaled row by row, so the maximum that weights refer to stays until
// it is passed by more than {{ most_growth }}, and the sums then pass workgroup memory (Milakov & Gimelshein
// 2018; Dao 2022; the postponed rescaling as in FlashAttention-4). A key that a row does not see leaves
// its sums as they are, and whether a row's sums are scaled depends on that row alone.
{% set products, outputs, out_tile_at = 1, 1, walk * (head_size // 8 + 1) %}
{% import "parts/attention_fragments.wgsl" as parts with context %}
{% set out_eights = n_heads * parts.eights %}
{% set q_eights = out_eights if cached else stride // 2 %}
{% set kv_eights = 2 * n_kv_heads * parts.eights if cached else stride // 2 %}
{% set source = "halves" if cached else "qkv" %}
{% set sources = [[source, q_eights, "q_column"]] %}
{% set pieces = [[source, kv_eights, "k_column"], [source, kv_eights, "v_column"]] %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
{% if cached %}
@group(0) @binding(1) var<storage, read> halves: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> sizes: array<u32>;
@group(0) @binding(3) var<storage, read> positions: array<u32>;
@group(0) @binding(4) var<storage, read_write> out: array<vec4<f32>>;
{% from "parts/row_power.wgsl" import row_exponent %}

// Of what a head's numbers are multiplied by.
fn power_exponent(head: u32) -> i32 { return {{ row_exponent("sizes[head]") }}; }
fn power_of(exponent: i32) -> f32 { return bitcast<f32>(u32(127 + exponent) << 23u); }
{% else %}
@group(0) @binding(1) var<storage, read> qkv: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;
{% endif %}

{{ parts.declare_tiles() }}
var<workgroup> factors: array<f32, {{ block * parts.chunks }}>; // of rows, for each chunk
var<workgroup> moved: u32; // the last step's first key, + 1, at which a row's sums are scaled

const lowest = -3.0e38; // below every score, and its own difference is 0 where -inf's is NaN

{{ parts.entry() }}
    let head = index % {{ n_heads }}u;
    let blocks = (extent.rows + block - 1u) / block;
    if (index / {{ n_heads }}u >= blocks) { return; }
    // The last rows see the most keys: they go first, so that none of them is left to the end.
    let own = (blocks - 1u - index / {{ n_heads }}u) * block;
    let last = min(own + block, extent.rows);
    // The last block begins so early that it ends with the memory, and stores only what is its own.
    let first = min(own, {{ maximum_rows - block }}u);
    let q_column = head * {{ parts.eights }}u;
    let kv_head = head / {{ n_heads // n_kv_heads }}u;
    let k_column = {{ keys_at if cached else out_eights }}u + kv_head * {{ parts.eights }}u;
    let v_column = k_column + {{ n_kv_heads * parts.eights }}u;
{% if cached %}
    let begin = positions[0];
    // Of q's power and k's: beyond f32's range scores are as good as zero, or as infinite.
    let exponent = power_exponent(head) + power_exponent({{ n_heads }}u + kv_head);
    let score_power = power_of(clamp(-exponent, -126, 127));
    let v_power = power_of(-power_exponent({{ n_heads + n_kv_heads }}u + kv_head));
{% endif %}
    {{ parts.declare_teams(sources) }}
    {{ parts.declare_fetched() }}
{% for q in range(parts.turns) %}
    {{ parts.declare_item(q) }}
    {{ parts.declare_from(q) }}
    var max_{{ q }} = lowest;
    var total_{{ q }} = 0.0;
{% endfor %}

    if (lane == 0u) { moved = 0u; } // kernels run without the zeros that WebGPU gives
    var part = own; // the rows before it are done
    while (part < last) {
        {{ parts.begin_keys() }}
    {{ parts.fetch(pieces, "key", "stop") }}
        for (; key < stop; key += walk) {
            workgroupBarrier();
    {{ parts.store_tiles() }}
            workgroupBarrier();
    {{ parts.fetch(pieces, "(key + walk)", "stop") }}
    {{ parts.multiply_scores(sources) }}
            workgroupBarrier();
{% for q in range(parts.turns) %}
            var highest_{{ q }} = lowest;
            let to_{{ q }} = min({{ parts.place_of("row_%d" % q) }}, stop - 1u);
{% for x in range(parts.chunk // 4) %}
            var s_{{ q }}_{{ x }} = vec4<f32>();
{% endfor %}
            {{ parts.has_item(q) }}
            {
                let at = {{ parts.scores_at }}u + local_{{ q }} * {{ parts.score_step }}u;
                for (var x = 0u; x < {{ walk // 4 }}u; x++) {
                    let keys = vec4<u32>(key + 4u * x) + vec4<u32>(0u, 1u, 2u, 3u);
                    let seen = (keys >= vec4<u32>(from_{{ q }})) & (keys <= vec4<u32>(to_{{ q }}));
                    let s = select(vec4<f32>(lowest), bitcast<vec4<f32>>(tiles[at + x]), seen);
                    highest_{{ q }} = max(highest_{{ q }}, max(max(s.x, s.y), max(s.z, s.w)));
                }
{% for x in range(parts.chunk // 4) %}
                s_{{ q }}_{{ x }} = bitcast<vec4<f32>>(tiles[at + chunk_{{ q }} * {{ parts.chunk // 4 }}u + {{ x }}u]);
{% endfor %}
            }
{% endfor %}
            workgroupBarrier();
{% for q in range(parts.turns) %}
            {{ parts.has_item(q) }}
            {
                var factor = 1.0;
                if (highest_{{ q }} > lowest) { // sees one of the keys
                    var top = vec4<f32>(highest_{{ q }});
                    {{ parts.scale_score("top", "top_tanh") }}
                    if (max_{{ q }} == lowest) {
                        max_{{ q }} = top.x; // there are no sums yet
                    } else if (top.x > max_{{ q }} + {{ most_growth }}) {
                        factor = exp(max_{{ q }} - top.x);
                        max_{{ q }} = top.x;
                        total_{{ q }} *= factor;
                        moved = key + 1u;
                    }
                }
                if (chunk_{{ q }} == 0u) { factors[local_{{ q }}] = factor; }
                let at = {{ parts.scores_at }}u + local_{{ q }} * {{ parts.score_step }}u + chunk_{{ q }} * {{ parts.chunk // 4 }}u;
                let first_key = key + chunk_{{ q }} * {{ parts.chunk }}u;
{% for x in range(0, parts.chunk // 4, 2) %}
                {
{% for y in range(2) %}
                    var s{{ y }} = s_{{ q }}_{{ x + y }};
                    {{ parts.scale_score("s%d" % y, "t%d" % y) }}
                    let keys{{ y }} = vec4<u32>(first_key + {{ 4 * (x + y) }}u) + vec4<u32>(0u, 1u, 2u, 3u);
                    let seen{{ y }} = (keys{{ y }} >= vec4<u32>(from_{{ q }})) & (keys{{ y }} <= vec4<u32>(to_{{ q }}));
                    let p{{ y }} = select(vec4<f32>(), exp(s{{ y }} - vec4<f32>(max_{{ q }})), seen{{ y }});
{% endfor %}
                    let eight = packed(p0, p1);
                    let sum = unpacked(eight.xy) + unpacked(eight.zw); // as the products have them
                    total_{{ q }} += (sum.x + sum.y) + (sum.z + sum.w);
                    tiles[at + {{ x // 2 }}u] = eight;
                }
{% endfor %}
            }
{% endfor %}
            if (workgroupUniformLoad(&moved) == key + 1u) {
                // The keys' tile is done with, and large enough.
{% set scaling %}
                let shrink = factors[row];
                tiles[unit] = bitcast<vec4<u32>>(shrink * bitcast<vec4<f32>>(tiles[unit]));
                tiles[unit + 1u] = bitcast<vec4<u32>>(shrink * bitcast<vec4<f32>>(tiles[unit + 1u]));
{% endset %}
{{ parts.through_stage(scaling, back=true) }}
            }
    {{ parts.add_weighted() }}
        }
        part = {{ "last" if cached else "stop" }};
    }

    workgroupBarrier();
{% for q in range(parts.turns) %}
    {{ parts.has_item(q) }}
    { factors[chunk_{{ q }} * block + local_{{ q }}] = total_{{ q }}; }
{% endfor %}
    workgroupBarrier();
{% if not cached %}
{% for q in range(parts.turns) %}
    if (chunk_{{ q }} == 0u && row_{{ q }} >= own && row_{{ q }} < last) {
        let total = factors[local_{{ q }}]{% for c in range(1, parts.chunks) %} + factors[local_{{ q }} + {{ c * block }}u]{% endfor %};
        lse[row_{{ q }} * {{ n_heads }}u + head] = max_{{ q }} + log(total);
    }
{% endfor %}
{% endif %}
{% set storing %}
                if (first + row >= own && first + row < last) {
                    let total = factors[row]{% for c in range(1, parts.chunks) %} + factors[row + {{ c * block }}u]{% endfor %};
{% if cached %}
                    let at = (first + row) * {{ 2 * out_eights }}u + 2u * q_column + column / 4u;
                    out[at] = bitcast<vec4<f32>>(tiles[unit]) / total * v_power;
                    out[at + 1u] = bitcast<vec4<f32>>(tiles[unit + 1u]) / total * v_power;
{% else %}
                    out[(first + row) * {{ out_eights }}u + q_column + column / 8u] = packed(
                        bitcast<vec4<f32>>(tiles[unit]) / total,
                        bitcast<vec4<f32>>(tiles[unit + 1u]) / total,
                    );
{% endif %}
                }
{% endset %}
{{ parts.through_stage(storing) }}
}
