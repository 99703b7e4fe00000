// largest[h, t] = the bits of the largest finite |number| of head h in stretch t, of {{ stretch }} rows; of no other is
// a power of two, since infinity and NaN stay what they are.
//
// Bindings: qkv [rows, 4 · {{ stride }}] (only q is read), positions u32 [rows], which ascend by one, keys and values (see
// kv_store.wgsl), largest u32 [{{ n_heads + 2 * n_kv_heads }}, {{ stretches }}]. One workgroup a head and stretch; no order matters.
{% include "parts/cached_heads.wgsl" %}
@group(0) @binding(5) var<storage, read_write> largest: array<u32>;

var<workgroup> bits: atomic<u32>;

// The larger number's bits, where x is finite.
fn larger(bits: vec4<u32>, x: vec4<f32>) -> vec4<u32> {
    let of_x = bitcast<vec4<u32>>(abs(x));
    return select(bits, max(bits, of_x), of_x < vec4(0x7f800000u));
}

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
    var own = vec4<u32>();
    for (var unit = lane; unit < units; unit += lanes) {
        let place = place_of(head, unit);
        let row = number * stretch + place.x;
        if (row < rows.y) {
            let eight = eight_of(head, row, place.y);
            own = larger(larger(own, eight.a), eight.b);
        }
    }
    atomicMax(&bits, max(max(own.x, own.y), max(own.z, own.w)));
    workgroupBarrier();
    if (lane == 0u) { largest[head * {{ stretches }}u + number] = atomicLoad(&bits); }
}
