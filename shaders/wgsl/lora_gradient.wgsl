// gradient_s[i, j] += scale · Σ_m left[m, left_column_g + i] · right[m, right_column_g + j]
//
// Bindings: left [rows, {{ left_stride }}], right [rows, {{ right_stride }}], gradient_s [n_left, n_right], one of each
// slice s. The member g follows from i. The rows in use are cut into {{ n_slices }} equal stretches;
// workgroups with z = s sum stretch s and add it to slice s, so that no two lanes write one element
// and no second pass is needed (the optimizer adds the slices up).
//
// A lane holds {{ lane_left }} × {{ lane_right }} elements in named accumulators and sums rows split, split + {{ splits }}, … of its
// stretch in order{% if splits > 1 %}; the {{ splits }} splits of a block meet in workgroup memory, in order{% endif %}.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> left: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> right: array<vec4<f32>>;
{% for s in range(n_slices) %}
@group(0) @binding({{ 3 + s }}) var<storage, read_write> gradient_{{ s }}: array<vec4<f32>>;
{% endfor %}

const n_right = {{ n_right }}u;
const left_blocks = {{ n_left // lane_left }}u;
const right_blocks = {{ n_right // lane_right }}u;
const blocks = {{ 64 // splits }}u; // of one workgroup
const splits = {{ splits }}u;
{% set quads = lane_right // 4 %}
const n_sums = {{ lane_left * quads }}u; // vectors of a block
{% if splits > 1 %}

var<workgroup> sums: array<vec4<f32>, {{ 64 * lane_left * quads }}>; // [n_sums, splits, blocks]
{% endif %}

fn add(slice: u32, i: u32, j: u32, value: vec4<f32>) {
    let at = (i * n_right + j) / 4u;
{% for s in range(n_slices) %}
    if (slice == {{ s }}u) { gradient_{{ s }}[at] += {{ scale }} * value; }
{% endfor %}
}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let block = group.x * blocks + lane % blocks;
    let split = lane / blocks;
    // Neighbouring lanes differ along the longer side, whose loads then lie side by side.
{% if n_left > n_right %}
    let i = block % left_blocks * {{ lane_left }}u;
    let j = block / left_blocks * {{ lane_right }}u;
{% else %}
    let i = block / right_blocks * {{ lane_left }}u;
    let j = block % right_blocks * {{ lane_right }}u;
{% endif %}
    let inside = block < left_blocks * right_blocks;
    var left_column = {{ members[0].shift }}u + i;
    var right_column = {{ members[0].right_column }}u + j;
{% for m in members[1:] %}
    if (i >= {{ m.first }}u) {
        left_column = {{ m.shift }}u + i;
        right_column = {{ m.right_column }}u + j;
    }
{% endfor %}
    let stretch = (extent.rows + {{ n_slices - 1 }}u) / {{ n_slices }}u;
    let first = group.z * stretch;
    let last = select(0u, min(first + stretch, extent.rows), inside);
{% for a in range(lane_left) %}
{% for b in range(quads) %}
    var sum_{{ a }}_{{ b }} = vec4<f32>();
{% endfor %}
{% endfor %}
    for (var m = first + split; m < last; m += splits) {
        let left_at = (m * {{ left_stride }}u + left_column) / 4u;
        let right_at = (m * {{ right_stride }}u + right_column) / 4u;
{% for a in range(lane_left // 4) %}
        let l_{{ a }} = left[left_at + {{ a }}u];
{% endfor %}
{% for b in range(quads) %}
        let r_{{ b }} = right[right_at + {{ b }}u];
{% endfor %}
{% for a in range(lane_left) %}
{% for b in range(quads) %}
        sum_{{ a }}_{{ b }} += l_{{ a // 4 }}[{{ a % 4 }}] * r_{{ b }};
{% endfor %}
{% endfor %}
    }
{% if splits == 1 %}
    if (!inside) { return; }
{% for a in range(lane_left) %}
{% for b in range(quads) %}
    add(group.z, i + {{ a }}u, j + {{ 4 * b }}u, sum_{{ a }}_{{ b }});
{% endfor %}
{% endfor %}
{% else %}
{% for a in range(lane_left) %}
{% for b in range(quads) %}
    sums[{{ (a * quads + b) * 64 }}u + lane] = sum_{{ a }}_{{ b }};
{% endfor %}
{% endfor %}
    workgroupBarrier();
    if (!inside) { return; }
    for (var n = split; n < n_sums; n += splits) {
        let at = n * 64u + lane % blocks;
        var sum = sums[at];
        for (var s = 1u; s < splits; s += 1u) { sum += sums[at + s * blocks]; }
        add(group.z, i + n / {{ quads }}u, j + n % {{ quads }}u * 4u, sum);
    }
{% endif %}
}
