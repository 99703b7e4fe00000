// token[m] = the lowest i < {{ length }} with x[m, i] = max_i x[m, i].
//
// Bindings: x [rows, {{ stride }}], token u32 [rows]. One workgroup a row: a lane takes the columns lane,
// lane + 256, …; the lanes' maxima meet in a tree. NaN is never the maximum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> token: array<u32>;

const lanes = 256u;
var<workgroup> maxima: array<f32, 256>;
var<workgroup> places: array<u32, 256>;

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.x + group.y * groups.x;
    if (row >= extent.rows) { return; }
    var highest = -3.4e38;
    var place = lane;
    for (var i = lane; i < {{ length }}u; i += lanes) {
        let value = x[row * {{ stride }}u + i];
        if (value > highest) {
            highest = value;
            place = i;
        }
    }
    maxima[lane] = highest;
    places[lane] = place;
    workgroupBarrier();
    for (var step = lanes / 2u; step > 0u; step /= 2u) {
        if (lane < step) {
            let other = maxima[lane + step];
            let lower = places[lane + step] < places[lane];
            if (other > maxima[lane] || (other == maxima[lane] && lower)) {
                maxima[lane] = other;
                places[lane] = places[lane + step];
            }
        }
        workgroupBarrier();
    }
    if (lane == 0u) { token[row] = places[0]; }
}
