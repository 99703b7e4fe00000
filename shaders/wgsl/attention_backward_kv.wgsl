// d_v[j] = Σ_h Σ_i p[i, j] d_out[i],   d_k[j] = scale Σ_h Σ_i d_s[i, j] q[i], over the query heads
// h that share the key head and the rows i that see j; p and d_s as in attention_backward_q.wgsl.
//
// Bindings: qkv and d_qkv [rows, (n_heads + 2 n_kv_heads) head_size] (only the columns of k and v
// are written), d_out [rows, n_heads head_size], lse and dots [rows, n_heads], segments [rows, 2].
// One workgroup a key head and {{ 8 * per_lane }} key rows. Heads ascend, and within a head the
// queries, from the first of these rows to the last that sees one of them; a query that does not
// see a key leaves its sums bit for bit.

{% import "attention_tiles.wgsl" as tiles with context %}
{% set out_stride = n_heads * tiles.head %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> d_out: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> lse: array<f32>;
@group(0) @binding(4) var<storage, read> dots: array<f32>;
@group(0) @binding(5) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(6) var<storage, read_write> d_qkv: array<vec4<f32>>;

{{ tiles.declare_tiles() }}
@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let kv_head = index % {{ n_kv_heads }}u;
    let first = index / {{ n_kv_heads }}u * block; // the first keys are seen by the most rows
    if (first >= extent.rows) { return; }
    let last = min(first + block, extent.rows);
    let ty = lane / 8u % 8u; // % 8: the compiler sees that tile indices stay in range
    let tx = lane % 8u;
    let k_column = ({{ n_heads }}u + kv_head) * {{ tiles.head }}u;
    let v_column = k_column + {{ n_kv_heads * tiles.head }}u;

    {% for i in range(per_lane) %}
    let row{{ i }} = first + ty + {{ 8 * i }}u;
    var to{{ i }} = 0u; // the end of the rows that see the key
    if (row{{ i }} < last) {
        to{{ i }} = min(segments[row{{ i }}].y, extent.rows);
    {% if window %}
        to{{ i }} = min(to{{ i }}, row{{ i }} + {{ window }}u);
    {% endif %}
    }
    {% for n in range(tiles.groups) %}
    var d_k{{ n }}_{{ i }} = vec4<f32>();
    var d_v{{ n }}_{{ i }} = vec4<f32>();
    {% endfor %}
    {% endfor %}

    var end = min(segments[last - 1u].y, extent.rows);
    {% if window %}
    end = min(end, last - 1u + {{ window }}u);
    {% endif %}
    for (var shared_head = 0u; shared_head < {{ n_heads // n_kv_heads }}u; shared_head += 1u) {
        let head = kv_head * {{ n_heads // n_kv_heads }}u + shared_head;
        let q_column = head * {{ tiles.head }}u;
        for (var query = first; query < end; query += 32u) {
    {% for i in range(per_lane) %}
            var s{{ i }} = vec4<f32>();
            var d_p{{ i }} = vec4<f32>();
    {% endfor %}
            for (var column = 0u; column < {{ tiles.head }}u; column += {{ chunk }}u) {
                workgroupBarrier();
    {{ tiles.load_a("qkv", "first", "last", stride, "k_column", "column") }}
    {{ tiles.load_b_transposed("qkv", "query", "end", stride, "q_column", "column") }}
                workgroupBarrier();
    {{ tiles.add_products("s") }}
                workgroupBarrier();
    {{ tiles.load_a("qkv", "first", "last", stride, "v_column", "column") }}
    {{ tiles.load_b_transposed("d_out", "query", "end", out_stride, "q_column", "column") }}
                workgroupBarrier();
    {{ tiles.add_products("d_p") }}
            }
    {{ tiles.scale_scores("s") }}
            let queries = vec4<u32>(query + 4u * tx) + vec4<u32>(0u, 1u, 2u, 3u);
            let at = min(queries, vec4<u32>(end - 1u)) * {{ n_heads }}u + head;
            let lse_here = vec4<f32>(lse[at.x], lse[at.y], lse[at.z], lse[at.w]);
            let dots_here = vec4<f32>(dots[at.x], dots[at.y], dots[at.z], dots[at.w]);
    {% for i in range(per_lane) %}
            let seen{{ i }} = (queries >= vec4<u32>(row{{ i }})) & (queries < vec4<u32>(to{{ i }}));
            let p{{ i }} = select(vec4<f32>(), exp(s{{ i }} - lse_here), seen{{ i }});
            weights[(ty + {{ 8 * i }}u) * 8u + tx] = p{{ i }};
    {% endfor %}
    {% for k in range(tiles.chunks) %}
            workgroupBarrier();
    {{ tiles.load_b("d_out", "query", "end", out_stride, "q_column", (k * chunk) ~ "u") }}
            workgroupBarrier();
    {{ tiles.add_weighted("d_v", k) }}
    {% endfor %}
    {% for k in range(tiles.chunks) %}
            workgroupBarrier();
    {% if k == 0 %}
    {% for i in range(per_lane) %}
            {
                var d_s = p{{ i }} * (d_p{{ i }} - dots_here) * {{ scale }};
    {% if softcap %}
                d_s *= vec4<f32>(1.0) - t{{ i }} * t{{ i }};
    {% endif %}
                weights[(ty + {{ 8 * i }}u) * 8u + tx] = d_s;
            }
    {% endfor %}
    {% endif %}
    {{ tiles.load_b("qkv", "query", "end", stride, "q_column", (k * chunk) ~ "u") }}
            workgroupBarrier();
    {{ tiles.add_weighted("d_k", k) }}
    {% endfor %}
        }
    }

    {% for i in range(per_lane) %}
    if (row{{ i }} < last) {
        let at = row{{ i }} * {{ stride }}u + tx;
    {% for n in range(tiles.groups) %}
        if (tx < {{ tiles.head - 8 * n }}u) {
            d_qkv[at + k_column + {{ 8 * n }}u] = d_k{{ n }}_{{ i }};
            d_qkv[at + v_column + {{ 8 * n }}u] = d_v{{ n }}_{{ i }};
        }
    {% endfor %}
    }
    {% endfor %}
}
