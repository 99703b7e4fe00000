// weights[m] = scale.value over the rows in use. One lane a row.

struct Extent { rows: u32 }
struct Scale { value: f32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<uniform> scale: Scale;
@group(0) @binding(2) var<storage, read_write> weights: array<f32>;

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = (group.x + group.y * groups.x) * {{ lanes }}u + lane;
    if (row < extent.rows) { weights[row] = scale.value; }
}
