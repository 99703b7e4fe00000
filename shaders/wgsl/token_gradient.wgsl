// d_rows[j] += Σ_m w(m, j) · v[m]{% if of_head %} with w(m, j) = d_logits[m, j]{% else %} with w(m, j) = {{ scale }} where tokens[m] is ids[j], else 0{% endif %}.
//
// Bindings: {% if of_head %}d_logits [rows, {{ n_columns }}]{% else %}tokens u32 [rows], ids u32 [{{ n_columns }}]{% endif %}, v [rows, {{ width }}], d_rows [{{ n_columns }}, {{ width }}]. A workgroup owns
// {{ quads }} quads of columns of four tokens; {{ splits }} lanes share one, and lane s sums rows s, s + {{ splits }}, … in
// order; the lanes meet in workgroup memory, in order.

{% set lanes = quads * splits %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
{% if of_head %}
@group(0) @binding(1) var<storage, read> d_logits: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> d_rows: array<vec4<f32>>;
{% else %}
@group(0) @binding(1) var<storage, read> tokens: array<u32>;
@group(0) @binding(2) var<storage, read> ids: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> v: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> d_rows: array<vec4<f32>>;
{% endif %}

{% if splits > 1 %}
var<workgroup> sums: array<mat4x4<f32>, {{ lanes }}>; // [splits, quads]: a column of each is a token's
{% endif %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let four = index / {{ column_groups }}u;
    let quad = index % {{ column_groups }}u * {{ quads }}u + lane % {{ quads }}u;
    let inside = quad < {{ width // 4 }}u && four < {{ n_columns // 4 }}u;
    var s0 = vec4<f32>();
    var s1 = vec4<f32>();
    var s2 = vec4<f32>();
    var s3 = vec4<f32>();
    if (inside) {
{% if not of_head %}
        let own = ids[four];
{% endif %}
        for (var m = lane / {{ quads }}u; m < extent.rows; m += {{ splits }}u) {
{% if of_head %}
            let w = d_logits[m * {{ n_columns // 4 }}u + four];
{% else %}
            let here = vec4<u32>(tokens[m]) == own;
            if (!any(here)) { continue; }
            let w = select(vec4<f32>(), vec4<f32>({{ scale }}), here);
{% endif %}
            let x = v[m * {{ width // 4 }}u + quad];
            s0 += w.x * x;
            s1 += w.y * x;
            s2 += w.z * x;
            s3 += w.w * x;
        }
    }
{% if splits > 1 %}
    sums[lane] = mat4x4<f32>(s0, s1, s2, s3);
    workgroupBarrier();
    if (lane >= {{ quads }}u || !inside) { return; }
    for (var s = 1u; s < {{ splits }}u; s += 1u) {
        let other = sums[lane + s * {{ quads }}u];
        s0 += other[0];
        s1 += other[1];
        s2 += other[2];
        s3 += other[3];
    }
{% else %}
    if (!inside) { return; }
{% endif %}
    let at = 4u * four * {{ width // 4 }}u + quad;
    d_rows[at] += s0;
    d_rows[at + {{ width // 4 }}u] += s1;
    d_rows[at + {{ 2 * (width // 4) }}u] += s2;
    d_rows[at + {{ 3 * (width // 4) }}u] += s3;
}
