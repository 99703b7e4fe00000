// d_k and d_v as in attention_backward_kv.wgsl, on matrix units, of each query head by itself:
// d_v[j] = Σ_i p[i, j] d_out[i], d_k[j] = scale Σ_i d_s[i, j] q[i], over the rows i that see j; p and d_s as
// in attention_matrix_backward_q.wgsl.
//
// Bindings, f16 in eights: qkv [rows, (n_heads + 2 n_kv_heads) head_size], d_out [rows, n_heads head_size];
// lse and dots [rows, n_heads], segments [rows, 2], and
{% if split %}
// head_sums [rows, 2, n_heads head_size], f32: d_k and d_v, which attention_backward_kv_sum.wgsl adds over
// the query heads that share a key head.
{% else %}
// d_qkv like qkv, of which only the columns of k and v are written.
{% endif %}
// One workgroup a query head and block of {{ block }} key rows, example by example; queries ascend in steps of
// {{ walk }} counted from the example's first row. p and d_s are f16, sums f32 in the units' order; a query that
// does not see a key leaves its sums as they are.
{% set products, outputs, out_tile_at = 2, 2, 0 %}
{% import "parts/attention_fragments.wgsl" as parts with context %}
{% set qkv_eights = stride // 2 %}
{% set out_eights = n_heads * parts.eights %}
{% set sources = [["qkv", qkv_eights, "k_column"], ["qkv", qkv_eights, "v_column"]] %}
{% set pieces = [["qkv", qkv_eights, "q_column"], ["d_out", out_eights, "q_column"]] %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read> d_out: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> dots: array<f32>;
@group(0) @binding(5) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> {{ "head_sums: array<vec4<f32>>" if split else "d_qkv: array<vec4<u32>>" }};

{{ parts.declare_tiles() }}
var<workgroup> of_queries: array<vec2<f32>, walk>; // lse and dots

{{ parts.entry() }}
    let own = index / {{ n_heads }}u * block; // the first keys are seen by the most rows
    if (own >= extent.rows) { return; }
    let last = min(own + block, extent.rows);
    // The last block begins so early that it ends with the memory, and stores only what is its own.
    let first = min(own, {{ maximum_rows - block }}u);
    let head = index % {{ n_heads }}u;
    let kv_head = head / {{ n_heads // n_kv_heads }}u;
    let q_column = head * {{ parts.eights }}u;
    let k_column = ({{ n_heads }}u + kv_head) * {{ parts.eights }}u;
    let v_column = k_column + {{ n_kv_heads * parts.eights }}u;
    {{ parts.declare_teams(sources) }}
    {{ parts.declare_fetched() }}
    var fetched_stats = vec2<f32>();
{% for q in range(parts.turns) %}
    {{ parts.declare_item(q) }}
    var to_{{ q }} = 0u; // the end of the rows that see the key
    if (row_{{ q }} >= own && row_{{ q }} < last) {
        to_{{ q }} = min(segments[row_{{ q }}].y, extent.rows);
{% if window %}
        to_{{ q }} = min(to_{{ q }}, row_{{ q }} + {{ window }}u);
{% endif %}
    }
{% endfor %}

    var part = own; // the keys before it are done
    while (part < last) {
        let segment = segments[part];
        let stop = clamp(segment.y, part + 1u, last);
        var end = min(segment.y, extent.rows); // of the queries that see one of the part's keys
{% if window %}
        end = min(end, stop - 1u + {{ window }}u);
{% endif %}
        var query = segment.x + (part - segment.x) / walk * walk;
{% set fetch_stats %}
        if (lane < walk) {
            let at = min(FROM + lane, end - 1u) * {{ n_heads }}u + head;
            fetched_stats = vec2(lse[at], dots[at]);
        }
{% endset %}
    {{ parts.fetch(pieces, "query", "end") }}
    {{ fetch_stats | replace("FROM", "query") }}
        for (; query < end; query += walk) {
            workgroupBarrier();
    {{ parts.store_tiles() }}
            if (lane < walk) { of_queries[lane] = fetched_stats; }
            workgroupBarrier();
    {{ parts.fetch(pieces, "(query + walk)", "end") }}
    {{ fetch_stats | replace("FROM", "query + walk") }}
    {{ parts.multiply_scores(sources) }}
            workgroupBarrier();
{% for q in range(parts.turns) %}
            {{ parts.has_item(q) }}
            {
                let to = min(to_{{ q }}, end);
                let at = {{ parts.scores_at }}u + local_{{ q }} * {{ parts.score_step }}u + chunk_{{ q }} * {{ parts.chunk // 4 }}u;
                let first_query = chunk_{{ q }} * {{ parts.chunk }}u;
{% for x in range(0, parts.chunk // 4, 2) %}
                {
{% for y in range(2) %}
                    var s{{ y }} = bitcast<vec4<f32>>(tiles[at + {{ x + y }}u]);
                    let d_p{{ y }} = bitcast<vec4<f32>>(tiles[at + {{ parts.score_size + x + y }}u]);
                    {{ parts.scale_score("s%d" % y, "t%d" % y) }}
{% for z in range(4) %}
                    let of{{ y }}_{{ z }} = of_queries[first_query + {{ 4 * (x + y) + z }}u];
{% endfor %}
                    let queries{{ y }} = vec4<u32>(query + first_query + {{ 4 * (x + y) }}u) + vec4<u32>(0u, 1u, 2u, 3u);
                    let seen{{ y }} = (queries{{ y }} >= vec4<u32>(row_{{ q }})) & (queries{{ y }} < vec4<u32>(to));
                    let lse{{ y }} = vec4(of{{ y }}_0.x, of{{ y }}_1.x, of{{ y }}_2.x, of{{ y }}_3.x);
                    let dots{{ y }} = vec4(of{{ y }}_0.y, of{{ y }}_1.y, of{{ y }}_2.y, of{{ y }}_3.y);
                    let p{{ y }} = select(vec4<f32>(), exp(s{{ y }} - lse{{ y }}), seen{{ y }});
                    var d_s{{ y }} = p{{ y }} * (d_p{{ y }} - dots{{ y }});
{% if softcap %}
                    d_s{{ y }} *= vec4<f32>(1.0) - t{{ y }} * t{{ y }};
{% endif %}
                    d_s{{ y }} = select(vec4<f32>(), d_s{{ y }}, seen{{ y }});
{% endfor %}
                    tiles[at + {{ x // 2 }}u] = packed(d_s0, d_s1); // over scores that were read
                    tiles[at + {{ parts.score_size + x // 2 }}u] = packed(p0, p1);
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
                    let of_v = owner >= {{ parts.outs }}u;
                    let factor = select({{ scale }}, 1.0, of_v);
                    let a = factor * bitcast<vec4<f32>>(tiles[unit]);
                    let b = factor * bitcast<vec4<f32>>(tiles[unit + 1u]);
{% if split %}
                    let to = (2u * (first + row) + select(0u, 1u, of_v)) * {{ 2 * out_eights }}u + 2u * q_column + column / 4u;
                    head_sums[to] = a;
                    head_sums[to + 1u] = b;
{% else %}
                    let to = (first + row) * {{ qkv_eights }}u + select(k_column, v_column, of_v) + column / 8u;
                    d_qkv[to] = packed(a, b);
{% endif %}
                }
{% endset %}
{{ parts.through_stage(storing) }}
}
