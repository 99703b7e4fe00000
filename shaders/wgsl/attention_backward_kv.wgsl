// d_v[j] = Σ_h Σ_i p[i, j] d_out[i],   d_k[j] = scale Σ_h Σ_i d_s[i, j] q[i], over the query heads
// h that share the key head and the rows i that see j; p and d_s as in attention_backward_q.wgsl.
//
// Bindings: qkv [rows, (n_heads + 2 n_kv_heads) head_size], d_out [rows, n_heads head_size], lse and
// dots [rows, n_heads], segments [rows, 2], and
{% if split %}
// head_sums [rows, 2, n_heads head_size]: d_k and d_v of each query head by itself, which
// attention_backward_kv_sum.wgsl adds.
// One workgroup a query head and block of key rows.
{% else %}
// d_qkv like qkv, of which only the columns of k and v are written.
// One workgroup a key head and block of key rows; sums over one head's queries are added up over
// the heads, which ascend, in d_qkv itself.
{% endif %}
// Queries ascend in blocks of 32 counted from the example's first row; of {{ teams }} such blocks
// each team of lanes takes one, and the teams' sums meet at the end of a head, in order. A query
// that does not see a key leaves its sums bit for bit.
{% if slices > 1 %}
// s and d_p are sums of {{ slices }} parts, in order, each over some columns of the head.
{% endif %}
{% if half %}
// Sums of up to 32 products are f16, those of all f32; the sums over queries are scaled after them.
{% endif %}

{% import "parts/attention_tiles.wgsl" as tiles with context %}
{% from "parts/stored.wgsl" import stored %}
{% set shared_heads = n_heads // n_kv_heads %}
{% set out_stride = n_heads * tiles.head %}
{% set last_chunk = tiles.chunks - 1 %}
{% set queries = ["qkv", "own", "end", stride, "q_column"] %}
{% set d_outs = ["d_out", "own", "end", out_stride, "q_column"] %}
{% set next_queries = ["qkv", "own + pace", "end", stride, "q_column", "0u"] %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<{{ qkv_type }}>>;
@group(0) @binding(2) var<storage, read> d_out: array<vec4<{{ d_out_type }}>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> dots: array<f32>;
@group(0) @binding(5) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> {{ "head_sums" if split else "d_qkv" }}: array<vec4<{{ sums_type }}>>;

{{ tiles.declare_tiles(2) }}
@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    {% set owners = n_heads if split else n_kv_heads %}
    let first = index / {{ owners }}u * block; // the first keys are seen by the most rows
    if (first >= extent.rows) { return; }
    let last = min(first + block, extent.rows);
    {{ tiles.declare_lanes() }}
    let kv_head = index % {{ owners }}u{{ " / " ~ shared_heads ~ "u" if split }};
    let k_column = ({{ n_heads }}u + kv_head) * {{ tiles.head }}u;
    let v_column = k_column + {{ n_kv_heads * tiles.head }}u;

    {% if held %}
    {{ tiles.load_a("qkv", stride, "k_column", scaled=true) }}
    {{ tiles.load_a("qkv", stride, "v_column", tile=1) }}
    {% endif %}
    {% for i in range(per_lane) %}
    let row{{ i }} = first + ty + {{ tiles.high * i }}u;
    var to{{ i }} = 0u; // the end of the rows that see the key
    if (row{{ i }} < last) {
        to{{ i }} = min(segments[row{{ i }}].y, extent.rows);
    {% if window %}
        to{{ i }} = min(to{{ i }}, row{{ i }} + {{ window }}u);
    {% endif %}
    }
    {% endfor %}
    let last_example = segments[last - 1u].x;

    {% if split %}
    {
        let head = index % {{ n_heads }}u;
    {% else %}
    for (var shared_head = 0u; shared_head < {{ shared_heads }}u; shared_head += 1u) {
        let head = kv_head * {{ shared_heads }}u + shared_head;
    {% endif %}
        let q_column = head * {{ tiles.head }}u;
    {% for i in range(per_lane) %}
    {% for n in range(tiles.groups) %}
        var d_k{{ n }}_{{ i }} = vec4<f32>();
        var d_v{{ n }}_{{ i }} = vec4<f32>();
    {% endfor %}
    {% endfor %}
        var part = first; // the keys before it are done
        while (part < last) {
            let segment = segments[part];
            var stop = last;
            var end = min(segment.y, extent.rows); // of the queries that see one of the part's keys
            if (segment.x < part) {
                stop = clamp(segment.y, part + 1u, last);
            } else if (part < last_example) {
                // Whole examples, at most 32 rows together: as if each began the block of queries.
                stop = last_example;
                end = last_example;
            }
    {% if window %}
            end = min(end, stop - 1u + {{ window }}u);
    {% endif %}
    {% if teams > 1 %}
            var query = segment.x + (part - segment.x) / pace * pace; // the teams keep their turns
    {% else %}
            var query = part;
    {% endif %}
    {% if prefetch %}
            {
                let own = query + 32u * team;
    {{ tiles.fetch("next", queries + ["0u"]) }}
            }
    {% endif %}
            for (; query < end; query += pace) {
                let own = query + 32u * team; // the first of the team's 32 queries
                let queries = vec4<u32>(own + 4u * tx) + vec4<u32>(0u, 1u, 2u, 3u);
                let at = min(queries, vec4<u32>(end - 1u)) * {{ n_heads }}u + head;
                let lse_here = vec4<f32>(lse[at.x], lse[at.y], lse[at.z], lse[at.w]);
                let dots_here = vec4<f32>(dots[at.x], dots[at.y], dots[at.z], dots[at.w]);
    {% for i in range(per_lane) %}
                var s{{ i }} = vec4<f32>();
                var d_p{{ i }} = vec4<f32>();
    {% endfor %}
    {{ tiles.add_products("s", 0, ["qkv", stride, "k_column"], queries, d_outs + ["0u"], scaled=true) }}
    {{ tiles.join_slices("s") }}
    {{ tiles.scale_scores("s") }}
    {% for i in range(per_lane) %}
                var p{{ i }} = vec4<f32>();
                {{ tiles.owns(i) }}{
                    let to_here = min(to{{ i }}, end);
                    let seen = (queries >= vec4<u32>(row{{ i }})) & (queries < vec4<u32>(to_here));
                    p{{ i }} = select(vec4<f32>(), exp(s{{ i }} - lse_here), seen);
                    {{ tiles.store_weights(i, "p" ~ i) }}
                }
    {% endfor %}
    {% set next = (d_outs if last_chunk else queries) + ["0u"] %}
    {{ tiles.add_products("d_p", 1, ["qkv", stride, "v_column"], d_outs, next) }}
    {{ tiles.add_weighted("d_v", last_chunk) }}
    {% for k in range(last_chunk) %}
    {{ tiles.take_b(
        d_outs + [tiles.at(k)],
        [d_outs + [tiles.at(k + 1)] if k + 1 < last_chunk else queries + ["0u"]]
    ) }}
    {{ tiles.add_weighted("d_v", k) }}
    {% endfor %}
    {% set weigh_gradients %}
    {{ tiles.join_slices("d_p") }}
    {% for i in range(per_lane) %}
                {{ tiles.owns(i) }}{
                    var d_s = p{{ i }} * (d_p{{ i }} - dots_here){{ " * " ~ scale if not half }};
    {% if softcap %}
                    d_s *= vec4<f32>(1.0) - t{{ i }} * t{{ i }};
    {% endif %}
                    {{ tiles.store_weights(i, "d_s") }}
                }
    {% endfor %}
    {% endset %}
    {% for k in range(tiles.chunks) %}
    {{ tiles.take_b(
        queries + [tiles.at(k)],
        [queries + [tiles.at(k + 1)] if k < last_chunk else next_queries],
        weigh_gradients if k == 0 else ""
    ) }}
    {{ tiles.add_weighted("d_k", k) }}
    {% endfor %}
            }
            part = stop;
        }
    {{ tiles.add_teams("d_k") }}
    {{ tiles.add_teams("d_v") }}
    {% for i in range(per_lane) %}
        if (row{{ i }} < last{{ " && team == 0u" if teams > 1 }}) {
    {% if half %}
    {% for n in range(tiles.groups) %}
            d_k{{ n }}_{{ i }} *= {{ scale }};
    {% endfor %}
    {% endif %}
    {% if split %}
            let to = row{{ i }} * {{ 2 * out_stride }}u + q_column + slice_tx;
    {% for n in range(tiles.groups) %}
            {{ tiles.inside(n) }}{
                head_sums[to + {{ tiles.column(n) }}] = d_k{{ n }}_{{ i }};
                head_sums[to + {{ out_stride }}u + {{ tiles.column(n) }}] = d_v{{ n }}_{{ i }};
            }
    {% endfor %}
    {% else %}
            let to = row{{ i }} * {{ stride }}u + slice_tx;
    {% for n in range(tiles.groups) %}
            {{ tiles.inside(n) }}{
                let to_k = to + k_column + {{ tiles.column(n) }};
                let to_v = to + v_column + {{ tiles.column(n) }};
    {% if shared_heads > 1 %}
                if (shared_head > 0u) {
                    d_k{{ n }}_{{ i }} = vec4<f32>(d_qkv[to_k]) + d_k{{ n }}_{{ i }};
                    d_v{{ n }}_{{ i }} = vec4<f32>(d_qkv[to_v]) + d_v{{ n }}_{{ i }};
                }
    {% endif %}
                d_qkv[to_k] = {{ stored("d_k" ~ n ~ "_" ~ i, sums_type) }};
                d_qkv[to_v] = {{ stored("d_v" ~ n ~ "_" ~ i, sums_type) }};
            }
    {% endfor %}
    {% endif %}
        }
    {% endfor %}
    }
}
