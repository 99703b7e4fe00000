// d_q[i] = scale Σ_j d_s[i, j] k[j],   d_s = p (d_p - dots[i]) (1 - tanh²),   d_p = d_out[i]·v[j],
// p = exp(s - lse[i]); s, and the rows j that i sees, as in attention.wgsl; tanh only with a cap;
// dots[i] = d_out[i]·out[i], what the softmax's gradient takes off each d_p, is left to the kernel
// of d_k and d_v.
//
// Bindings: qkv and d_qkv [rows, (n_heads + 2 n_kv_heads) head_size] (only the columns of q are
// written), out and d_out [rows, n_heads head_size], lse and dots [rows, n_heads], segments [rows, 2].
// One workgroup a head and block of query rows. Keys ascend in blocks of 32 counted from the
// example's first row; of {{ teams }} such blocks each team of lanes takes one, and the teams' sums
// meet at the end, in order. A key that a row does not see leaves its sums bit for bit.
{% if slices > 1 %}
// s and d_p are sums of {{ slices }} parts, in order, each over some columns of the head.
{% endif %}
{% if half %}
// Sums of up to 32 products are f16, those of all f32; the sums over keys are scaled after them.
{% endif %}
// dots: eight lanes a row, each sums every eighth vec4; the 8 sums meet in order.

{% import "parts/attention_tiles.wgsl" as tiles with context %}
{% from "parts/stored.wgsl" import stored %}
{% set out_stride = n_heads * tiles.head %}
{% set last_chunk = tiles.chunks - 1 %}
{% set keys = ["qkv", "own", "stop", stride, "k_column"] %}
{% set values = ["qkv", "own", "stop", stride, "v_column"] %}
{% set next_values = ["qkv", "own + pace", "stop", stride, "v_column", "0u"] %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<{{ qkv_type }}>>;
@group(0) @binding(2) var<storage, read> out: array<vec4<{{ out_type }}>>;
@group(0) @binding(3) var<storage, read> d_out: array<vec4<{{ d_out_type }}>>;
@group(0) @binding(4) var<storage, read> lse: array<f32>;
@group(0) @binding(5) var<storage, read_write> dots: array<f32>;
@group(0) @binding(6) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(7) var<storage, read_write> d_qkv: array<vec4<{{ d_qkv_type }}>>;

{{ tiles.declare_tiles(2) }}
@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let head = index % {{ n_heads }}u;
    let blocks = (extent.rows + block - 1u) / block;
    if (index / {{ n_heads }}u >= blocks) { return; }
    let first = (blocks - 1u - index / {{ n_heads }}u) * block; // the longest rows go first
    let last = min(first + block, extent.rows);
    {{ tiles.declare_lanes() }}
    let q_column = head * {{ tiles.head }}u;
    let k_column = ({{ n_heads }}u + head / {{ n_heads // n_kv_heads }}u) * {{ tiles.head }}u;
    let v_column = k_column + {{ n_kv_heads * tiles.head }}u;

    {% if held %}
    {{ tiles.load_a("qkv", stride, "q_column", scaled=true) }}
    {{ tiles.load_a("d_out", out_stride, "q_column", tile=1) }}
    {% endif %}
    {% for i in range(per_lane) %}
    let row{{ i }} = first + ty + {{ tiles.high * i }}u;
    var from{{ i }} = 0xffffffffu; // the first key that the row sees
    var lse{{ i }} = 0.0;
    var dots{{ i }} = 0.0;
    if (row{{ i }} < last) {
        from{{ i }} = segments[row{{ i }}].x;
    {% if window %}
        if (row{{ i }} >= {{ window }}u) {
            from{{ i }} = max(from{{ i }}, row{{ i }} - {{ window - 1 }}u);
        }
    {% endif %}
        lse{{ i }} = lse[row{{ i }} * {{ n_heads }}u + head];
        let at = row{{ i }} * {{ out_stride }}u + q_column + tx;
    {% for n in range(tiles.head_groups) %}
        {{ tiles.inside(n) }}{
            dots{{ i }} += dot(vec4<f32>(d_out[at + {{ 8 * n }}u]), vec4<f32>(out[at + {{ 8 * n }}u]));
        }
    {% endfor %}
    }
    weights[part_row + {{ 8 * tiles.high * i }}u + tx].x = dots{{ i }};
    {% for n in range(tiles.groups) %}
    var d_q{{ n }}_{{ i }} = vec4<f32>();
    {% endfor %}
    {% endfor %}
    workgroupBarrier();
    {% for i in range(per_lane) %}
    {
        let at = part_row + {{ 8 * tiles.high * i }}u;
        dots{{ i }} = weights[at].x;
    {% for x in range(1, 8) %}
        dots{{ i }} += weights[at + {{ x }}u].x;
    {% endfor %}
        if (team == 0u && slice_tx == 0u && row{{ i }} < last) {
            dots[row{{ i }} * {{ n_heads }}u + head] = dots{{ i }};
        }
    }
    {% endfor %}

    var part = first; // the rows before it are done
    while (part < last) {
        let segment = segments[part];
        var stop = last;
        if (segment.x < part) { stop = clamp(segment.y, part + 1u, last); }
        var key = segment.x;
    {% if window %}
        if (part + 1u > key + {{ window }}u) {
            key += (part + 1u - {{ window }}u - key) / pace * pace;
        }
    {% endif %}
    {% if prefetch %}
        {
            let own = key + 32u * team;
    {{ tiles.fetch("next", values + ["0u"]) }}
        }
    {% endif %}
        for (; key < stop; key += pace) {
            let own = key + 32u * team; // the first of the team's 32 keys
    {% for i in range(per_lane) %}
            var s{{ i }} = vec4<f32>();
            var d_p{{ i }} = vec4<f32>();
    {% endfor %}
    {{ tiles.add_products("d_p", 1, ["d_out", out_stride, "q_column"], values, keys + ["0u"]) }}
    {{ tiles.join_slices("d_p") }}
    {% set next = keys + ["0u"] if last_chunk else next_values %}
    {{ tiles.add_products("s", 0, ["qkv", stride, "q_column"], keys, next, scaled=true) }}
    {{ tiles.join_slices("s") }}
    {{ tiles.scale_scores("s") }}
            let keys = vec4<u32>(own + 4u * tx) + vec4<u32>(0u, 1u, 2u, 3u);
    {% for i in range(per_lane) %}
            {{ tiles.owns(i) }}{
                let to = min(row{{ i }}, stop - 1u);
                let seen = (keys >= vec4<u32>(from{{ i }})) & (keys <= vec4<u32>(to));
                let p = exp(s{{ i }} - vec4<f32>(lse{{ i }}));
                var d_s = p * (d_p{{ i }} - vec4<f32>(dots{{ i }})){{ " * " ~ scale if not half }};
    {% if softcap %}
                d_s *= vec4<f32>(1.0) - t{{ i }} * t{{ i }};
    {% endif %}
                d_s = select(vec4<f32>(), d_s, seen);
                {{ tiles.store_weights(i, "d_s") }}
            }
    {% endfor %}
            workgroupBarrier();
    {{ tiles.add_weighted("d_q", last_chunk) }}
    {% for k in range(last_chunk) %}
    {{ tiles.take_b(
        keys + [tiles.at(k)],
        [keys + [tiles.at(k + 1)] if k + 1 < last_chunk else next_values]
    ) }}
    {{ tiles.add_weighted("d_q", k) }}
    {% endfor %}
        }
        part = stop;
    }

    {{ tiles.add_teams("d_q") }}
    {% if teams > 1 %}
    if (team > 0u) { return; }
    {% endif %}
    {% for i in range(per_lane) %}
    if (row{{ i }} < last) {
        let to = row{{ i }} * {{ stride }}u + q_column + slice_tx;
    {% for n in range(tiles.groups) %}
        {{ tiles.inside(n) }}{
            let value = d_q{{ n }}_{{ i }}{{ " * " ~ scale if half }};
            d_qkv[to + {{ tiles.column(n) }}] = {{ stored("value", d_qkv_type) }};
        }
    {% endfor %}
    }
    {% endfor %}
}
