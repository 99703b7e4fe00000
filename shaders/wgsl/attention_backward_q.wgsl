// d_q[i] = scale Σ_j d_s[i, j] k[j],   d_s = p (d_p - dots[i]) (1 - tanh²),   d_p = d_out[i]·v[j],
// p = exp(s - lse[i]); s, and the rows j that i sees, as in attention.wgsl; tanh only with a cap.
//
// Bindings: qkv and d_qkv [rows, (n_heads + 2 n_kv_heads) head_size] (only the columns of q are
// written), d_out [rows, n_heads head_size], lse and dots [rows, n_heads], segments [rows, 2].
// One workgroup a head and {{ 8 * per_lane }} query rows. Keys ascend from the first that the first
// of these rows sees to the last of the rows; a key that a row does not see leaves its sums bit for
// bit.

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
    let head = index % {{ n_heads }}u;
    let blocks = (extent.rows + block - 1u) / block;
    if (index / {{ n_heads }}u >= blocks) { return; }
    let first = (blocks - 1u - index / {{ n_heads }}u) * block; // the longest rows go first
    let last = min(first + block, extent.rows);
    let ty = lane / 8u % 8u; // % 8: the compiler sees that tile indices stay in range
    let tx = lane % 8u;
    let q_column = head * {{ tiles.head }}u;
    let k_column = ({{ n_heads }}u + head / {{ n_heads // n_kv_heads }}u) * {{ tiles.head }}u;
    let v_column = k_column + {{ n_kv_heads * tiles.head }}u;

    {% for i in range(per_lane) %}
    let row{{ i }} = first + ty + {{ 8 * i }}u;
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
        dots{{ i }} = dots[row{{ i }} * {{ n_heads }}u + head];
    }
    {% for n in range(tiles.groups) %}
    var d_q{{ n }}_{{ i }} = vec4<f32>();
    {% endfor %}
    {% endfor %}

    var key = segments[first].x;
    {% if window %}
    if (first >= {{ window }}u) { key = max(key, first - {{ window - 1 }}u); }
    {% endif %}
    for (; key < last; key += 32u) {
    {% for i in range(per_lane) %}
        var s{{ i }} = vec4<f32>();
        var d_p{{ i }} = vec4<f32>();
    {% endfor %}
        for (var column = 0u; column < {{ tiles.head }}u; column += {{ chunk }}u) {
            workgroupBarrier();
    {{ tiles.load_a("qkv", "first", "last", stride, "q_column", "column") }}
    {{ tiles.load_b_transposed("qkv", "key", "last", stride, "k_column", "column") }}
            workgroupBarrier();
    {{ tiles.add_products("s") }}
            workgroupBarrier();
    {{ tiles.load_a("d_out", "first", "last", out_stride, "q_column", "column") }}
    {{ tiles.load_b_transposed("qkv", "key", "last", stride, "v_column", "column") }}
            workgroupBarrier();
    {{ tiles.add_products("d_p") }}
        }
    {{ tiles.scale_scores("s") }}
        let keys = vec4<u32>(key + 4u * tx) + vec4<u32>(0u, 1u, 2u, 3u);
    {% for i in range(per_lane) %}
        {
            let seen = (keys >= vec4<u32>(from{{ i }})) & (keys <= vec4<u32>(row{{ i }}));
            let p = exp(s{{ i }} - vec4<f32>(lse{{ i }}));
            var d_s = p * (d_p{{ i }} - vec4<f32>(dots{{ i }})) * {{ scale }};
    {% if softcap %}
            d_s *= vec4<f32>(1.0) - t{{ i }} * t{{ i }};
    {% endif %}
            weights[(ty + {{ 8 * i }}u) * 8u + tx] = select(vec4<f32>(), d_s, seen);
        }
    {% endfor %}
    {% for k in range(tiles.chunks) %}
        workgroupBarrier();
    {{ tiles.load_b("qkv", "key", "last", stride, "k_column", (k * chunk) ~ "u") }}
        workgroupBarrier();
    {{ tiles.add_weighted("d_q", k) }}
    {% endfor %}
    }

    {% for i in range(per_lane) %}
    if (row{{ i }} < last) {
        let to = row{{ i }} * {{ stride }}u + q_column + tx;
    {% for n in range(tiles.groups) %}
        if (tx < {{ tiles.head - 8 * n }}u) { d_qkv[to + {{ 8 * n }}u] = d_q{{ n }}_{{ i }}; }
    {% endfor %}
    }
    {% endfor %}
}
