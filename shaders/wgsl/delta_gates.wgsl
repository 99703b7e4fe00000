// g = a · softplus(alpha + dt),   beta = 1 / (1 + exp(−b)),   a row and value head each
//
// Bindings: projected [rows, {{ stride }}] of {{ x_type }} with b in columns {{ first }} and on and alpha in the {{ heads }} after them,
// a [{{ heads }}], dt [{{ heads }}], inputs [rows, {{ input_stride }}], whose last {{ 2 * heads }} columns are g and beta.
// One lane a row and four heads.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> projected: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> a: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> dt: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> inputs: array<vec4<f32>>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / {{ heads // 4 }}u;
    if (row >= extent.rows) { return; }
    let head = index % {{ heads // 4 }}u;
    let from_at = row * {{ stride // 4 }}u + {{ first // 4 }}u + head;
    let b = vec4<f32>(projected[from_at]);
    let x = vec4<f32>(projected[from_at + {{ heads // 4 }}u]) + dt[head];
    let softplus = max(x, vec4<f32>()) + log(vec4(1.0) + exp(-abs(x)));
    let to = row * {{ input_stride // 4 }}u + {{ (input_stride - 2 * heads) // 4 }}u + head;
    inputs[to] = a[head] * softplus;
    inputs[to + {{ heads // 4 }}u] = vec4(1.0) / (vec4(1.0) + exp(-b));
}
