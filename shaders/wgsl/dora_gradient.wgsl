{% from "parts/stored.wgsl" import stored %}
// d_p[m, j] = scales[j] · d_y[m, j], and for the rows j of each member's B, at b of the magnitudes:
// d_magnitudes[b] += inverses[j] · Σ_m d_y[m, j] · p[m, j]
//
// Bindings: d_y [rows, {{ width }}] of {{ d_y_type }}, p [rows, {{ width }}] of {{ p_type }}, scales and inverses [{{ width }}], d_p as d_y,
// d_magnitudes [rows of all members]. A workgroup owns {{ quads }} quads of columns; {{ splits }} lanes share one, and lane s
// sums rows s, s + {{ splits }}, … in order; the lanes meet in workgroup memory, in order.

{% set lanes = quads * splits %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
@group(0) @binding(2) var<storage, read> p: array<vec4<{{ p_type }}>>;
@group(0) @binding(3) var<storage, read> scales: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> inverses: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> d_p: array<vec4<{{ d_y_type }}>>;
@group(0) @binding(6) var<storage, read_write> d_magnitudes: array<vec4<f32>>;

var<workgroup> sums: array<vec4<f32>, {{ lanes }}>; // [splits, quads]

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let quad = (group.x + group.y * groups.x) * {{ quads }}u + lane % {{ quads }}u;
    let inside = quad < {{ width // 4 }}u;
    var sum = vec4<f32>();
    if (inside) {
        let scale = scales[quad];
        for (var m = lane / {{ quads }}u; m < extent.rows; m += {{ splits }}u) {
            let at = m * {{ width // 4 }}u + quad;
            let d = vec4<f32>(d_y[at]);
            sum += d * vec4<f32>(p[at]);
            let scaled = scale * d;
            d_p[at] = {{ stored("scaled", d_y_type) }};
        }
    }
    sums[lane] = sum;
    workgroupBarrier();
    if (lane >= {{ quads }}u || !inside) { return; }
    for (var s = 1u; s < {{ splits }}u; s += 1u) { sum += sums[lane + s * {{ quads }}u]; }
    let column = 4u * quad;
{% for m in members %}
    if (column >= {{ m.start }}u && column < {{ m.stop }}u) {
        let at = ({{ m.first }}u + column - {{ m.start }}u) / 4u;
        d_magnitudes[at] += inverses[quad] * sum;
    }
{% endfor %}
}
