// halves = the heads of q, keys and values as f16, each head multiplied by the power of two that brings its largest number
// to 2^4 … 2^5; sizes[h] = the bits of that number. Nothing finite becomes infinite.
//
// Bindings: qkv, positions, keys, values and largest as in head_sizes.wgsl; halves in eights: q [rows, {{ n_heads * head_size }}], and
// keys beside values [room, {{ 2 * n_kv_heads * head_size }}] from eight {{ keys_at }} on; sizes u32 [{{ n_heads + 2 * n_kv_heads }}]. One workgroup a head and
// stretch of {{ stretch }} rows.
{% include "parts/cached_heads.wgsl" %}
@group(0) @binding(5) var<storage, read> largest: array<u32>;
@group(0) @binding(6) var<storage, read_write> halves: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read_write> sizes: array<u32>;
{% from "parts/row_power.wgsl" import row_power %}
{% set eights = head_size // 8 %}

var<workgroup> bits: atomic<u32>;

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let head = index % {{ n_heads + 2 * n_kv_heads }}u;
    let number = index / {{ n_heads + 2 * n_kv_heads }}u;
    let rows = rows_of(head);
    if (number * stretch < rows.x || number * stretch >= rows.y) { return; }
    if (lane == 0u) { atomicStore(&bits, 0u); }
    workgroupBarrier();
    var own = 0u;
    for (var other = rows.x / stretch + lane; other * stretch < rows.y; other += lanes) {
        own = max(own, largest[head * {{ stretches }}u + other]);
    }
    atomicMax(&bits, own);
    workgroupBarrier();
    let size = atomicLoad(&bits);
    if (lane == 0u && number * stretch == rows.x) { sizes[head] = size; }
    let power = {{ row_power("size") }};
    for (var unit = lane; unit < units; unit += lanes) {
        let place = place_of(head, unit);
        let row = number * stretch + place.x;
        if (row < rows.y) {
            let eight = eight_of(head, row, place.y);
            var at = row * {{ n_heads * eights }}u + head * {{ eights }}u;
            if (head >= {{ n_heads }}u) {
                at = {{ keys_at }}u + row * {{ 2 * n_kv_heads * eights }}u + (head - {{ n_heads }}u) * {{ eights }}u;
            }
            let a = power * eight.a;
            let b = power * eight.b;
            halves[at + place.y] =
                vec4(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
        }
    }
}
