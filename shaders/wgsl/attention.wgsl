// out[i] = Σ_j p[i, j] v[j],   p[i, :] = softmax_j s[i, j],   lse[i] = log Σ_j exp s[i, j],
// s[i, j] = scale · q[i]·k[j], capped as cap · tanh(s / cap) where the model has a cap,
// over the rows j of i's example with j <= i and, where there is a window, i - j < window.
//
// Bindings: qkv [rows, (n_heads + 2 n_kv_heads) head_size], segments [rows, 2] (first row and end
// of the row's example), out [rows, n_heads head_size], lse [rows, n_heads].
// One workgroup a head and block of query rows, with a running maximum and sum (Milakov &
// Gimelshein 2018; Dao 2022). Keys ascend in blocks of 32 counted from the example's first row, so
// that the running maximum moves at the same keys wherever the example lies; of {{ teams }} such
// blocks each team of lanes takes one, and the teams' maxima and sums meet at the end, in order.
// Examples that begin inside the workgroup's rows (at most 32) have all keys seen among them: one
// block for them all. A team's sums run over its keys one by one; a key that a row does not see
// leaves them bit for bit.
{% if slices > 1 %}
// A score is the sum of {{ slices }} parts, in order, each over some columns of the head.
{% endif %}
{% if half %}
// Sums of up to 32 products are f16, those of all f32.
{% endif %}

{% import "parts/attention_tiles.wgsl" as tiles with context %}
{% from "parts/stored.wgsl" import stored %}
{% set keys = ["qkv", "own", "stop", stride, "k_column"] %}
{% set values = ["qkv", "own", "stop", stride, "v_column"] %}
{% set next_keys = ["qkv", "own + pace", "stop", stride, "k_column", "0u"] %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<{{ qkv_type }}>>;
@group(0) @binding(2) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<{{ out_type }}>>;
@group(0) @binding(4) var<storage, read_write> lse: array<f32>;

{{ tiles.declare_tiles(1) }}
var<workgroup> maxima: array<f32, {{ teams * tiles.block * 8 }}>; // [team][row of a][tx]

const lowest = -3.0e38; // below every score, and its own difference is 0 where -inf's is NaN

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
    // The last rows see the most keys: they go first, so that none of them is left to the end.
    let first = (blocks - 1u - index / {{ n_heads }}u) * block;
    let last = min(first + block, extent.rows);
    {{ tiles.declare_lanes() }}
    let q_column = head * {{ tiles.head }}u;
    let k_column = ({{ n_heads }}u + head / {{ n_heads // n_kv_heads }}u) * {{ tiles.head }}u;
    let v_column = k_column + {{ n_kv_heads * tiles.head }}u;

    {% for i in range(per_lane) %}
    let row{{ i }} = first + ty + {{ tiles.high * i }}u;
    var from{{ i }} = 0xffffffffu; // the first key that the row sees
    if (row{{ i }} < last) {
        from{{ i }} = segments[row{{ i }}].x;
    {% if window %}
        if (row{{ i }} >= {{ window }}u) {
            from{{ i }} = max(from{{ i }}, row{{ i }} - {{ window - 1 }}u);
        }
    {% endif %}
    }
    var max{{ i }} = lowest;
    var sum{{ i }} = 0.0;
    {% for n in range(tiles.groups) %}
    var o{{ n }}_{{ i }} = vec4<f32>();
    {% endfor %}
    {% endfor %}

    {% if held %}
    {{ tiles.load_a("qkv", stride, "q_column", scaled=true) }}
    {% endif %}
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
    {{ tiles.fetch("next", keys + ["0u"]) }}
        }
    {% endif %}
        for (; key < stop; key += pace) {
            let own = key + 32u * team; // the first of the team's 32 keys
    {% for i in range(per_lane) %}
            var s{{ i }} = vec4<f32>();
    {% endfor %}
    {{ tiles.add_products("s", 0, ["qkv", stride, "q_column"], keys, values + ["0u"], scaled=true) }}
    {{ tiles.join_slices("s") }}
    {{ tiles.scale_scores("s") }}
            // Past `stop` begins the next example, whose rows may lie in this block too.
            let keys = vec4<u32>(own + 4u * tx) + vec4<u32>(0u, 1u, 2u, 3u);
    {% for i in range(per_lane) %}
            let to{{ i }} = min(row{{ i }}, stop - 1u);
            let seen{{ i }} = (keys >= vec4<u32>(from{{ i }})) & (keys <= vec4<u32>(to{{ i }}));
            {{ tiles.owns(i) }}{
                s{{ i }} = select(vec4<f32>(lowest), s{{ i }}, seen{{ i }});
                maxima[w_row + {{ 8 * tiles.high * i }}u + tx] =
                    max(max(s{{ i }}.x, s{{ i }}.y), max(s{{ i }}.z, s{{ i }}.w));
            }
    {% endfor %}
            workgroupBarrier();
    {% for i in range(per_lane) %}
            {
                var highest = max{{ i }};
    {% for x in range(8) %}
                highest = max(highest, maxima[w_row + {{ 8 * tiles.high * i + x }}u]);
    {% endfor %}
                let shrink = exp(max{{ i }} - highest);
                {{ tiles.owns(i) }}{
                    let p = select(vec4<f32>(), exp(s{{ i }} - vec4<f32>(highest)), seen{{ i }});
                    {{ tiles.store_weights(i, "p") }}
                }
                max{{ i }} = highest;
                sum{{ i }} *= shrink;
    {% for n in range(tiles.groups) %}
                o{{ n }}_{{ i }} *= shrink;
    {% endfor %}
            }
    {% endfor %}
    {% for k in range(tiles.chunks) %}
    {{ tiles.take_b(
        values + [tiles.at(k)],
        [values + [tiles.at(k + 1)] if k + 1 < tiles.chunks else next_keys],
        free=(k == 0)
    ) }}
    {{ tiles.add_weighted("o", k, "sum" if k == 0 else "") }}
    {% endfor %}
        }
        part = stop;
    }

    {% if teams > 1 %}
    workgroupBarrier();
    {% for i in range(per_lane) %}
    weights[part_row + {{ 8 * tiles.high * i }}u + tx] = vec4<f32>(max{{ i }}, sum{{ i }}, 0.0, 0.0);
    {% endfor %}
    workgroupBarrier();
    {% for i in range(per_lane) %}
    {
        let at = part_row - team * block * 8u + {{ 8 * tiles.high * i }}u + tx;
    {% for t in range(teams) %}
        let of{{ t }} = weights[at + {{ 8 * t * tiles.block }}u];
    {% endfor %}
        var highest = of0.x;
    {% for t in range(1, teams) %}
        highest = max(highest, of{{ t }}.x);
    {% endfor %}
        sum{{ i }} = of0.y * exp(of0.x - highest);
    {% for t in range(1, teams) %}
        sum{{ i }} += of{{ t }}.y * exp(of{{ t }}.x - highest);
    {% endfor %}
        let shrink = exp(max{{ i }} - highest);
        max{{ i }} = highest;
    {% for n in range(tiles.groups) %}
        o{{ n }}_{{ i }} *= shrink;
    {% endfor %}
    }
    {% endfor %}
    {{ tiles.add_teams("o") }}
    if (team > 0u) { return; }
    {% endif %}
    {% for i in range(per_lane) %}
    if (row{{ i }} < last) {
        let to = row{{ i }} * {{ n_heads * tiles.head }}u + q_column + slice_tx;
    {% for n in range(tiles.groups) %}
        {{ tiles.inside(n) }}{
            let value = o{{ n }}_{{ i }} / sum{{ i }};
            out[to + {{ tiles.column(n) }}] = {{ stored("value", out_type) }};
        }
    {% endfor %}
        if (slice_tx == 0u) { lse[row{{ i }} * {{ n_heads }}u + head] = max{{ i }} + log(sum{{ i }}); }
    }
    {% endfor %}
}
