// Attention of one new row: its q and k{% if qk_norm %}, normed head by head and{% endif %} turned by rope, its k and v put into the
// cache, and of every stretch of {{ keys }} cached keys j <= position{% if window %} with position - j < {{ window }}{% endif %}
//   partial[h, s] = Σ_j exp(s[j] - highest) v[j],   then (highest s, Σ_j exp(s[j] - highest)),
//   s[j] = scale · q[h]·k[j], capped as cap · tanh(s / cap) where the model has a cap;
// attention_decode_combine.wgsl puts the stretches together. One that the row does not see is not written.
//
// Bindings: qkv [n_heads + 2 n_kv_heads, head_size], row u32 (the position at {{ position_at }}, the row of rope's tables
// at {{ rope_row_at }}), tables [n_positions, {{ half }}, 2] (cos, sin), keys [kv_size / 4, room] and values [room, kv_size / 4]
// of vec4 (see kv_store.wgsl), partial [n_heads, splits, head_size / 4 + 1] of vec4{% if qk_norm %}, q_weight and k_weight{% endif %}.
// One workgroup a head and a stretch. {{ lanes // keys }} lanes share a key's score, in the order of its columns; a lane adds
// four columns of every {{ teams }}th v, and these sums meet in order. The row's own key and value come out
// of workgroup memory: another workgroup may be writing them.

{% set quads = head_size // 4 %}
@group(0) @binding(0) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(1) var<storage, read> row: array<u32>;
@group(0) @binding(2) var<storage, read> tables: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> keys: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> values: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> partial: array<vec4<f32>>;
{% if qk_norm %}
@group(0) @binding(6) var<storage, read> q_weight: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> k_weight: array<vec4<f32>>;
{% endif %}

const quads = {{ quads }}u;
const head_size = {{ head_size }}u;
const half = {{ half }}u;
const room = {{ room }}u;
const kv_quads = {{ n_kv_heads * quads }}u;
const teams = {{ teams }}u; // lanes of a team have the columns of the head among them
const lowest = -3.0e38; // below every score, and its own difference is 0 where -inf's is NaN

var<workgroup> heads: array<f32, {{ 2 * head_size }}>; // q, k before rope
var<workgroup> query: array<vec4<f32>, {{ quads }}>;
var<workgroup> own_key: array<vec4<f32>, {{ quads }}>;
var<workgroup> own_value: array<vec4<f32>, {{ quads }}>;
var<workgroup> parts: array<f32, {{ lanes }}>;
var<workgroup> weights: array<f32, {{ keys }}>;
var<workgroup> sums: array<vec4<f32>, {{ lanes }}>;

{% with sum_lanes = keys, reduction = "max" %}{% include "parts/row_sum.wgsl" %}{% endwith %}
{% with sum_lanes = keys, reduction = "sum" %}{% include "parts/row_sum.wgsl" %}{% endwith %}

fn put_head(first: u32, quad: u32, value: vec4<f32>) {
{% for e in range(4) %}
    heads[first + 4u * quad + {{ e }}u] = value[{{ e }}];
{% endfor %}
}

// Column i of the head that begins at `first`, turned.
fn turned(first: u32, i: u32, table: u32) -> f32 {
    let value = heads[first + i];
{% if 2 * half < head_size %}
    if (i >= {{ 2 * half }}u) { return value; }
{% endif %}
{% if interleaved %}
    let is_second = i % 2u == 1u;
    let other = heads[first + (i ^ 1u)];
    let angle = tables[table + i / 2u];
{% else %}
    let is_second = i >= half;
    let other = heads[first + select(i + half, i - half, is_second)];
    let angle = tables[table + i % half];
{% endif %}
    return value * angle.x + select(-other, other, is_second) * angle.y;
}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let head = index / {{ splits }}u;
    if (head >= {{ n_heads }}u) { return; }
    let position = row[{{ position_at }}u];
    let block = index % {{ splits }}u * {{ keys }}u;
    var seen_from = 0u; // the first key that the row sees
{% if window %}
    if (position >= {{ window }}u) { seen_from = position - {{ window - 1 }}u; }
{% endif %}
    if (block > position || block + {{ keys }}u <= seen_from) { return; }
    let kv_head = head / {{ n_heads // n_kv_heads }}u;

    // The keys and values that the lane will take, asked for before anything waits.
    let key = block + lane % {{ keys }}u;
    let cached = kv_head * quads * room + min(key, position);
{% set shared_by = lanes // keys %}
{% set scored = (quads + shared_by - 1) // shared_by %}
{% for s in range(scored) %}
    let c_{{ s }} = {{ "min(lane / %du + %du, quads - 1u)" % (keys, s * shared_by) }};
    let key_quad_{{ s }} = keys[cached + c_{{ s }} * room];
{% endfor %}
    let team = lane / quads;
    let column = lane % quads;
{% set rounds = (keys + teams - 1) // teams %}
{% for t in range(rounds) %}
    let key_{{ t }} = min(block + team + {{ t * teams }}u, position);
    var value_{{ t }} = values[key_{{ t }} * kv_quads + kv_head * quads + column];
{% endfor %}

    let of_k = lane / quads; // lanes of q, then those of k, then those of v
    var mine = vec4<f32>();
    if (of_k < 3u) {
        let source = select(head, {{ n_heads }}u + (of_k - 1u) * {{ n_kv_heads }}u + kv_head, of_k > 0u);
        mine = qkv[source * quads + column];
        if (of_k < 2u) { put_head(of_k * head_size, column, mine); } else { own_value[column] = mine; }
    }
    workgroupBarrier();
{% if qk_norm %}
    if (of_k < 2u) {
        var squares = 0.0;
        for (var i = 0u; i < head_size; i += 1u) {
            let value = heads[of_k * head_size + i];
            squares += value * value;
        }
        let rstd = inverseSqrt(squares / {{ head_size }}.0 + {{ epsilon }});
        var weight = q_weight[column];
        if (of_k == 1u) { weight = k_weight[column]; }
        mine *= rstd * weight;
    }
    workgroupBarrier();
    if (of_k < 2u) { put_head(of_k * head_size, column, mine); }
    workgroupBarrier();
{% endif %}
    if (of_k < 2u) {
        let table = row[{{ rope_row_at }}u] * half;
        let first = of_k * head_size;
        let i = 4u * column;
        let result = vec4(
            turned(first, i, table), turned(first, i + 1u, table),
            turned(first, i + 2u, table), turned(first, i + 3u, table),
        );
        if (of_k == 0u) { query[column] = result; } else { own_key[column] = result; }
    }
    workgroupBarrier();
    // The first of the heads that share it stores the row's key and value.
    if (position - block < {{ keys }}u && head % {{ n_heads // n_kv_heads }}u == 0u && lane < quads) {
        keys[(kv_head * quads + lane) * room + position] = own_key[lane];
        values[position * kv_quads + kv_head * quads + lane] = own_value[lane];
    }

    let is_own = key >= position;
    var products = vec4<f32>();
{% for s in range(scored) %}
{% if (s + 1) * shared_by > quads %}
    if (lane < {{ (quads - s * shared_by) * keys }}u)
{% endif %}
    { products = fma(query[c_{{ s }}], select(key_quad_{{ s }}, own_key[c_{{ s }}], is_own), products); }
{% endfor %}
    parts[lane] = products.x + products.y + products.z + products.w;
    workgroupBarrier();
    var score = parts[lane % {{ keys }}u];
{% for s in range(1, shared_by) %}
    score += parts[lane % {{ keys }}u + {{ s * keys }}u];
{% endfor %}
{% if softcap %}
    // Some drivers' tanh overflows; beyond ±10 it is ±1 in f32.
    score = {{ softcap }} * tanh(clamp(score * {{ scale / softcap }}, -10.0, 10.0));
{% else %}
    score *= {{ scale }};
{% endif %}
    let seen = key <= position && key >= seen_from;
    let highest = row_max(select(lowest, score, seen), lane);
    let weight = select(0.0, exp(score - highest), seen);
    if (lane < {{ keys }}u) { weights[lane] = weight; }
    let total = row_sum(weight, lane); // its barriers are those of the weights, too

    var sum = vec4<f32>();
    if (team < teams) {
{% for t in range(rounds) %}
        if (key_{{ t }} == position) { value_{{ t }} = own_value[column]; }
{% if (t + 1) * teams > keys %}
        if (team < {{ keys - t * teams }}u)
{% endif %}
        { sum += weights[team + {{ t * teams }}u] * value_{{ t }}; }
{% endfor %}
    }
    sums[lane] = sum;
    workgroupBarrier();
    if (lane >= quads) { return; }
    var result = sums[lane];
{% for t in range(1, teams) %}
    result += sums[lane + {{ t * quads }}u];
{% endfor %}
    let at = index * (quads + 1u);
    partial[at + lane] = result;
    if (lane == 0u) { partial[at + quads] = vec4(highest, total, 0.0, 0.0); }
}
