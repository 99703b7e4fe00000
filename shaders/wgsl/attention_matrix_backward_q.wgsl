// d_q as in attention_backward_q.wgsl, on matrix units: d_q[i] = scale Σ_j d_s[i, j] k[j],
// d_s = p (d_p - dots[i]) (1 - tanh²), d_p = d_out[i]·v[j], p = exp(s - lse[i]); dots[i] = d_out[i]·out[i]
// is left to the kernel of d_k and d_v.
//
// Bindings, f16 in eights: qkv and d_qkv [rows, (n_heads + 2 n_kv_heads) head_size] (only the columns of q
// are written), out and d_out [rows, n_heads head_size]; lse and dots [rows, n_heads], segments [rows, 2].
// One workgroup a head and block of {{ block }} query rows, example by example; keys ascend in steps of {{ walk }}
// counted from the example's first row. d_s is f16 and scaled after the sums, which are f32 in the units'
// order; a key that a row does not see leaves them as they are. dots: columns ascend.
{% set products, outputs, out_tile_at = 2, 1, 0 %}
{% import "parts/attention_fragments.wgsl" as parts with context %}
{% set qkv_eights = stride // 2 %}
{% set out_eights = n_heads * parts.eights %}
{% set sources = [["qkv", qkv_eights, "q_column"], ["d_out", out_eights, "q_column"]] %}
{% set pieces = [["qkv", qkv_eights, "k_column"], ["qkv", qkv_eights, "v_column"]] %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> out: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> d_out: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> lse: array<f32>;
@group(0) @binding(5) var<storage, read_write> dots: array<f32>;
@group(0) @binding(6) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(7) var<storage, read_write> d_qkv: array<vec4<u32>>;

{{ parts.declare_tiles() }}
var<workgroup> own_dots: array<f32, block>;

{{ parts.entry() }}
    let head = index % {{ n_heads }}u;
    let blocks = (extent.rows + block - 1u) / block;
    if (index / {{ n_heads }}u >= blocks) { return; }
    let own = (blocks - 1u - index / {{ n_heads }}u) * block; // the longest rows go first
    let last = min(own + block, extent.rows);
    // The last block begins so early that it ends with the memory, and stores only what is its own.
    let first = min(own, {{ maximum_rows - block }}u);
    let q_column = head * {{ parts.eights }}u;
    let k_column = ({{ n_heads }}u + head / {{ n_heads // n_kv_heads }}u) * {{ parts.eights }}u;
    let v_column = k_column + {{ n_kv_heads * parts.eights }}u;
    {{ parts.declare_teams(sources) }}
    {{ parts.declare_fetched() }}

    if (lane < block && first + lane >= own && first + lane < last) {
        var sum = 0.0;
        for (var c = 0u; c < {{ parts.eights }}u; c++) {
            let a = out[(first + lane) * {{ out_eights }}u + q_column + c];
            let b = d_out[(first + lane) * {{ out_eights }}u + q_column + c];
            sum += dot(unpacked(a.xy), unpacked(b.xy)) + dot(unpacked(a.zw), unpacked(b.zw));
        }
        own_dots[lane] = sum;
        dots[(first + lane) * {{ n_heads }}u + head] = sum;
    }
    workgroupBarrier();
{% for q in range(parts.turns) %}
    {{ parts.declare_item(q) }}
    {{ parts.declare_from(q) }}
    let dots_{{ q }} = own_dots[local_{{ q }}];
    var lse_{{ q }} = 0.0;
    if (row_{{ q }} >= own && row_{{ q }} < last) { lse_{{ q }} = lse[row_{{ q }} * {{ n_heads }}u + head]; }
{% endfor %}

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
            {{ parts.has_item(q) }}
            {
                let to = min(row_{{ q }}, stop - 1u);
                let at = {{ parts.scores_at }}u + local_{{ q }} * {{ parts.score_step }}u + chunk_{{ q }} * {{ parts.chunk // 4 }}u;
                let first_key = key + chunk_{{ q }} * {{ parts.chunk }}u;
{% for x in range(0, parts.chunk // 4, 2) %}
                {
{% for y in range(2) %}
                    var s{{ y }} = bitcast<vec4<f32>>(tiles[at + {{ x + y }}u]);
                    let d_p{{ y }} = bitcast<vec4<f32>>(tiles[at + {{ parts.score_size + x + y }}u]);
                    {{ parts.scale_score("s%d" % y, "t%d" % y) }}
                    let keys{{ y }} = vec4<u32>(first_key + {{ 4 * (x + y) }}u) + vec4<u32>(0u, 1u, 2u, 3u);
                    let seen{{ y }} = (keys{{ y }} >= vec4<u32>(from_{{ q }})) & (keys{{ y }} <= vec4<u32>(to));
                    var d_s{{ y }} = exp(s{{ y }} - vec4<f32>(lse_{{ q }})) * (d_p{{ y }} - vec4<f32>(dots_{{ q }}));
{% if softcap %}
                    d_s{{ y }} *= vec4<f32>(1.0) - t{{ y }} * t{{ y }};
{% endif %}
                    d_s{{ y }} = select(vec4<f32>(), d_s{{ y }}, seen{{ y }});
{% endfor %}
                    tiles[at + {{ x // 2 }}u] = packed(d_s0, d_s1); // over scores that were read
                }
{% endfor %}
            }
{% endfor %}
            workgroupBarrier();
    {{ parts.add_weighted() }}
        }
        part = stop;
    }
{% set storing %}
                if (first + row >= own && first + row < last) {
                    d_qkv[(first + row) * {{ qkv_eights }}u + q_column + column / 8u] = packed(
                        {{ scale }} * bitcast<vec4<f32>>(tiles[unit]),
                        {{ scale }} * bitcast<vec4<f32>>(tiles[unit + 1u]),
                    );
                }
{% endset %}
{{ parts.through_stage(storing) }}
}
