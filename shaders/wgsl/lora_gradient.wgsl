// gradient_s[i, j] += scale · Σ_m left[m, left_column + i] · right[m, right_column + j]
//
// Bindings: left [rows, left_stride], right [rows, right_stride], gradient_s [n_left, n_right], one
// of each slice s. The rows in use are cut into {{ n_slices }} equal stretches; workgroups with z = s
// sum stretch s in order and add it to slice s, so that no two lanes share an element and no second
// pass is needed (the optimizer adds the slices up). One lane holds {{ lane_left }} × {{ lane_right }} elements.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> left: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> right: array<vec4<f32>>;
{% for s in range(n_slices) %}
@group(0) @binding({{ 3 + s }}) var<storage, read_write> gradient_{{ s }}: array<vec4<f32>>;
{% endfor %}

const n_left = {{ n_left }}u;
const n_right = {{ n_right }}u;
const left_blocks = {{ (n_left + lane_left - 1) // lane_left }}u;
const right_blocks = {{ (n_right + lane_right - 1) // lane_right }}u;

fn add(slice: u32, i: u32, j: u32, value: vec4<f32>) {
    if (i >= n_left || j >= n_right) { return; }
    let at = (({{ first_row }}u + i) * n_right + j) / 4u;
{% for s in range(n_slices) %}
    if (slice == {{ s }}u) { gradient_{{ s }}[at] += {{ scale }} * value; }
{% endfor %}
}

@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
    // Neighbouring lanes differ along the longer side, whose loads then lie side by side.
{% if n_left > n_right %}
    let i = (id.x % left_blocks) * {{ lane_left }}u;
    let j = (id.x / left_blocks) * {{ lane_right }}u;
{% else %}
    let i = (id.x / right_blocks) * {{ lane_left }}u;
    let j = (id.x % right_blocks) * {{ lane_right }}u;
{% endif %}
    if (i >= n_left || j >= n_right) { return; }
    let stretch = (extent.rows + {{ n_slices - 1 }}u) / {{ n_slices }}u;
    let first = id.z * stretch;
    let last = min(first + stretch, extent.rows);
{% for a in range(lane_left) %}
{% for b in range(lane_right // 4) %}
    var sum_{{ a }}_{{ b }} = vec4<f32>();
{% endfor %}
{% endfor %}
    for (var m = first; m < last; m += 1u) {
        let left_at = (m * {{ left_stride }}u + {{ left_column }}u + i) / 4u;
        let right_at = (m * {{ right_stride }}u + {{ right_column }}u + j) / 4u;
{% for a in range(lane_left // 4) %}
        let l_{{ a }} = left[left_at + {{ a }}u];
{% endfor %}
{% for b in range(lane_right // 4) %}
        let r_{{ b }} = right[right_at + {{ b }}u];
{% endfor %}
{% for a in range(lane_left) %}
{% for b in range(lane_right // 4) %}
        sum_{{ a }}_{{ b }} += l_{{ a // 4 }}[{{ a % 4 }}] * r_{{ b }};
{% endfor %}
{% endfor %}
    }
{% for a in range(lane_left) %}
{% for b in range(lane_right // 4) %}
    add(id.z, i + {{ a }}u, j + {{ 4 * b }}u, sum_{{ a }}_{{ b }});
{% endfor %}
{% endfor %}
}
