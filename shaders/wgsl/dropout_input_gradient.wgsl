{% from "parts/stored.wgsl" import stored %}
// out[m, k] {{ "+" if accumulate }}= scale · Σ_g kept_g[m, k] · Σ_r d_z[m, g · {{ rank }} + r] · A[g · {{ rank }} + r, k]
//
// Bindings: d_z [rows, {{ members * rank }}], A [{{ members * rank }}, {{ width }}], row_keys u32 [rows], matrix_keys (a uniform), out [rows,
// {{ width }}] of {{ out_type }}. A lane owns four columns of {{ lane_rows }} rows and sums r, then g, in order.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<uniform> matrix_keys: vec4<u32>;
@group(0) @binding(2) var<storage, read> row_keys: array<u32>;
@group(0) @binding(3) var<storage, read> d_z: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> factor: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read_write> out: array<vec4<{{ out_type }}>>;

const quads = {{ width // 4 }}u;
const quad_groups = {{ (width // 4 + lanes - 1) // lanes }}u;

{% include "parts/dropout.wgsl" %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let first_row = index / quad_groups * {{ lane_rows }}u;
    let quad = index % quad_groups * {{ lanes }}u + lane;
    if (first_row >= extent.rows || quad >= quads) { return; }
{% for i in range(lane_rows) %}
    let row_{{ i }} = min(first_row + {{ i }}u, extent.rows - 1u);
    var total_{{ i }} = vec4<f32>();
{% endfor %}
{% for g in range(members) %}
    {
{% for i in range(lane_rows) %}
        var sum_{{ i }} = vec4<f32>();
{% endfor %}
        for (var r = 0u; r < {{ rank // 4 }}u; r += 1u) {
{% for q in range(4) %}
            let a_{{ q }} = factor[({{ g * rank }}u + 4u * r + {{ q }}u) * quads + quad];
{% endfor %}
{% for i in range(lane_rows) %}
            let d_{{ i }} = d_z[row_{{ i }} * {{ members * rank // 4 }}u + {{ g * rank // 4 }}u + r];
{% for q in range(4) %}
            sum_{{ i }} += d_{{ i }}[{{ q }}] * a_{{ q }};
{% endfor %}
{% endfor %}
        }
        let key = quad_key(matrix_keys[{{ g }}], quad);
{% for i in range(lane_rows) %}
        total_{{ i }} += after_dropout(sum_{{ i }}, row_keys[row_{{ i }}], key);
{% endfor %}
    }
{% endfor %}
{% for i in range(lane_rows) %}
    if (first_row + {{ i }}u < extent.rows) {
        let at = row_{{ i }} * quads + quad;
        let sum = {{ "vec4<f32>(out[at]) + " if accumulate }}{{ scale }} * total_{{ i }};
        out[at] = {{ stored("sum", out_type) }};
    }
{% endfor %}
}
