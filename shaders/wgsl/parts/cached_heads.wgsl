{#
The heads that a text's new rows attend with: head 0 … of q [rows, {{ n_heads }}, {{ head_size }}], then of the cached keys and values
[room, {{ n_kv_heads }}, {{ head_size }}] that the rows see. A workgroup has `stretch` rows of one; keys lie as kv_store.wgsl says.
A file includes it for its bindings 0 to 4; it reads n_heads, n_kv_heads, head_size, stride, room, window, stretch
and stretches, of which a head has at most so many.
#}
{% set heads, quads, eights = n_heads + 2 * n_kv_heads, head_size // 4, head_size // 8 %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> qkv: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> positions: array<u32>;
@group(0) @binding(3) var<storage, read> keys: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> values: array<vec4<f32>>;

const lanes = 256u;
const stretch = {{ stretch }}u;
const units = {{ stretch * eights }}u; // eights of a workgroup

struct Eight { a: vec4<f32>, b: vec4<f32> }

// Rows of a head that are read, the first and the one past the last.
fn rows_of(head: u32) -> vec2<u32> {
    if (head < {{ n_heads }}u) { return vec2(0u, extent.rows); }
    let begin = positions[0];
    var first = 0u;
{% if window %}
    if (begin + 1u > {{ window }}u) { first = begin + 1u - {{ window }}u; } // what the first row sees
{% endif %}
    return vec2(first / stretch * stretch, begin + extent.rows);
}

// Row and eight of a workgroup's unit: lanes side by side read side by side.
fn place_of(head: u32, unit: u32) -> vec2<u32> {
    if (head >= {{ n_heads }}u && head < {{ n_heads + n_kv_heads }}u) { return vec2(unit % stretch, unit / stretch); }
    return vec2(unit / {{ eights }}u, unit % {{ eights }}u);
}

fn eight_of(head: u32, row: u32, eight: u32) -> Eight {
    if (head < {{ n_heads }}u) {
        let at = row * {{ stride }}u + head * {{ quads }}u + 2u * eight;
        return Eight(qkv[at], qkv[at + 1u]);
    }
    if (head < {{ n_heads + n_kv_heads }}u) {
        let at = ((head - {{ n_heads }}u) * {{ quads }}u + 2u * eight) * {{ room }}u + row;
        return Eight(keys[at], keys[at + {{ room }}u]);
    }
    let at = row * {{ n_kv_heads * quads }}u + (head - {{ n_heads + n_kv_heads }}u) * {{ quads }}u + 2u * eight;
    return Eight(values[at], values[at + 1u]);
}
