// y[s] = x[indices[s]]{% if scale != 1 %} · {{ scale }}{% endif %}; where indices[s] is 0xffffffff, y[s] = 0.
// Bindings: x [rows, width], indices u32 [out_rows], y [out_rows, width]. One lane four columns.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> indices: array<u32>;
@group(0) @binding(3) var<storage, read_write> y: array<vec4<f32>>;

const quads = {{ width // 4 }}u;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = (group.x + group.y * groups.x) * 64u + lane;
    let row = at / quads;
    if (row >= extent.rows) { return; }
    let index = indices[row];
    var value = vec4<f32>();
    if (index != 0xffffffffu) {
        value = x[index * quads + at % quads]{% if scale != 1 %} * {{ scale }}{% endif %};
    }
    y[at] = value;
}
