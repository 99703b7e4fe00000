// largest[m] = the bits of max_k |x[m, x_column + k]|, k < {{ columns }}: a NaN's are larger than those of infinity.
// Bindings: x [rows, {{ x_stride }}], largest u32 [rows]{{ ", place" if placed }}. One workgroup a row; no order matters.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> largest: array<u32>;
{% if placed %}
struct Place { x_column: u32, out_column: u32 }
@group(0) @binding(3) var<uniform> place: Place;
{% endif %}

var<workgroup> bits: atomic<u32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= extent.rows) { return; }
    if (lane == 0u) { atomicStore(&bits, 0u); }
    workgroupBarrier();
    let begin = (row * {{ x_stride }}u + {{ "place.x_column" if placed else "0u" }}) / 4u;
    var own = vec4<u32>();
    for (var quad = lane; quad < {{ columns // 4 }}u; quad += 64u) {
        own = max(own, bitcast<vec4<u32>>(abs(x[begin + quad])));
    }
    atomicMax(&bits, max(max(own.x, own.y), max(own.z, own.w)));
    workgroupBarrier();
    if (lane == 0u) { largest[row] = atomicLoad(&bits); }
}
