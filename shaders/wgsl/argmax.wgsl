// token[m] = the lowest i < {{ length }} with x[m, i] = max_i x[m, i].
//
// Bindings: x [rows, {{ stride }}], token u32 [rows]. One workgroup a row: a lane takes the quads of columns
// lane, lane + 256, …, {{ steps }} of them at once; the lanes' maxima meet in a tree. NaN is never the maximum.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
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
    let base = row * {{ stride // 4 }}u;
    var highest = -3.4e38;
    var place = 4u * lane;
    for (var quad = lane; quad < {{ (length + 3) // 4 }}u; quad += {{ steps }}u * lanes) {
{% for s in range(steps) %}
        let quad_{{ s }} = quad + {{ s }}u * lanes;
        let value_{{ s }} = x[base + min(quad_{{ s }}, {{ (length - 1) // 4 }}u)];
{% endfor %}
{% for s in range(steps) %}
{% for c in range(4) %}
        if (value_{{ s }}[{{ c }}] > highest && 4u * quad_{{ s }} + {{ c }}u < {{ length }}u) {
            highest = value_{{ s }}[{{ c }}];
            place = 4u * quad_{{ s }} + {{ c }}u;
        }
{% endfor %}
{% endfor %}
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
