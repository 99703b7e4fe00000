// d_k[j] = Σ_h head_sums[j, 0, h],   d_v[j] = Σ_h head_sums[j, 1, h], over the query heads h that
// share the key head.
//
// Bindings: head_sums [rows, 2, n_heads head_size], d_qkv [rows, (n_heads + 2 n_kv_heads) head_size]
// (only the columns of k and v are written).
// One lane a vec4 of d_k or d_v; heads ascend.

{% from "parts/stored.wgsl" import stored %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> head_sums: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> d_qkv: array<vec4<{{ d_qkv_type }}>>;

{% set head = head_size // 4 %}
{% set shared_heads = n_heads // n_kv_heads %}
const lanes = {{ lanes }}u;
const columns = {{ 2 * n_kv_heads * head }}u; // of k and v together

@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * lanes + lane;
    let row = index / columns;
    if (row >= extent.rows) { return; }
    let kv_head = index % columns / {{ head }}u; // those of v follow those of k
    let at = row * {{ 2 * n_heads * head }}u + kv_head * {{ shared_heads * head }}u + index % {{ head }}u;
    var sum = head_sums[at];
    {% for h in range(1, shared_heads) %}
    sum += head_sums[at + {{ h * head }}u];
    {% endfor %}
    d_qkv[row * {{ stride }}u + {{ n_heads * head }}u + index % columns] = {{ stored("sum", d_qkv_type) }};
}
