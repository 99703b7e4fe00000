// d_A[i, j] += Σ_m d_z[m, i] · x[m, j]   and, for each member g and its rows i of B,
// d_B[i, j] += scale · Σ_m d_y[m, column_g + i] · z[m, g · rank + j]
//
// Bindings: x [rows, {{ parts[0].right_stride }}] of {{ x_type }}, z [rows, {{ parts[1].right_stride }}], d_y [rows, {{ parts[1].left_stride }}] of {{ d_y_type }}, d_z [rows, {{ parts[0].left_stride }}]; gradient_s, one of each
// slice s: d_A and, from vec4 {{ parts[1].start }} on, d_B. The rows in use are cut into {{ n_slices }} equal stretches;
// workgroups with z = s sum stretch s and add it to slice s, so that no two lanes write one element
// and no second pass is needed (the optimizer adds the slices up). The first {{ parts[0].n_groups }} workgroups make
// d_A, the others d_B.
//
// A lane holds a block of elements in named accumulators and sums rows split, split + {{ splits }}, … of its
// stretch in order{% if splits > 1 %}; the {{ splits }} splits of a block meet in workgroup memory, in order{% endif %}. Neighbouring lanes differ along the
// gradient's shorter side, where they read the same of the longer one, then along the longer side.

{% set lanes = blocks * splits %}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> z: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> d_y: array<vec4<{{ d_y_type }}>>;
@group(0) @binding(4) var<storage, read> d_z: array<vec4<f32>>;
{% for s in range(n_slices) %}
@group(0) @binding({{ 5 + s }}) var<storage, read_write> gradient_{{ s }}: array<vec4<f32>>;
{% endfor %}

{% if dropout %}
// Of x counts what dropout leaves, for each member of A (parts/dropout.wgsl): keys of rows and of matrices.
@group(0) @binding({{ 5 + n_slices }}) var<storage, read> row_keys: array<u32>;
@group(0) @binding({{ 6 + n_slices }}) var<uniform> matrix_keys: vec4<u32>;

{% include "parts/dropout.wgsl" %}

{% endif %}
const blocks = {{ blocks }}u; // of one workgroup
const splits = {{ splits }}u;
{% if splits > 1 %}
{% set most_sums = [parts[0].lane_left * parts[0].lane_right, parts[1].lane_left * parts[1].lane_right] | max // 4 %}

var<workgroup> sums: array<vec4<f32>, {{ lanes * most_sums }}>; // [vectors of a block, splits, blocks]
{% endif %}

fn gradient_at(slice: u32, at: u32) -> vec4<f32> {
    var value = vec4<f32>();
{% for s in range(n_slices) %}
    if (slice == {{ s }}u) { value = gradient_{{ s }}[at]; }
{% endfor %}
    return value;
}

fn set_gradient(slice: u32, at: u32, value: vec4<f32>) {
{% for s in range(n_slices) %}
    if (slice == {{ s }}u) { gradient_{{ s }}[at] = value; }
{% endfor %}
}

{# Adds `count` rows from m on, `splits` apart, to the block's sums; all are loaded before the first. #}
{% macro add_rows(part, count) %}
{% set quads = part.lane_right // 4 %}
{% for u in range(count) %}
{% for a in range(part.lane_left // 4) %}
            let l_{{ u }}_{{ a }} = vec4<f32>({{ part.left }}[(m + {{ u * splits }}u) * {{ part.left_stride // 4 }}u + left_quad + {{ a }}u]);
{% endfor %}
{% if part.masked %}
            let row_key_{{ u }} = row_keys[m + {{ u * splits }}u];
{% endif %}
{% for b in range(quads) %}
            let r_{{ u }}_{{ b }} = vec4<f32>({{ part.right }}[(m + {{ u * splits }}u) * {{ part.right_stride // 4 }}u + right_quad + {{ b }}u]){{ " * kept(row_key_%d, key_%d)" % (u, b) if part.masked }};
{% endfor %}
{% endfor %}
{% for u in range(count) %}
{% for a in range(part.lane_left) %}
{% for b in range(quads) %}
            sum_{{ a }}_{{ b }} += l_{{ u }}_{{ a // 4 }}[{{ a % 4 }}] * r_{{ u }}_{{ b }};
{% endfor %}
{% endfor %}
{% endfor %}
{% endmacro %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let split = lane / blocks;
    let stretch = (extent.rows + {{ n_slices - 1 }}u) / {{ n_slices }}u;
    let first = group.z * stretch;
{% for part in parts %}
{% set quads = part.lane_right // 4 %}
{% set n_sums = part.lane_left * quads %}
    {{ "if (group.x < %du) {" % part.n_groups if loop.first else "} else {" }}
{% set short_groups = part.short_blocks // part.short_lanes %}
        let tile = {{ "group.x" if loop.first else "group.x - %du" % parts[0].n_groups }};
        let short_block = tile % {{ short_groups }}u * {{ part.short_lanes }}u + lane % blocks % {{ part.short_lanes }}u;
        let long_block = tile / {{ short_groups }}u * {{ blocks // part.short_lanes }}u + lane % blocks / {{ part.short_lanes }}u;
        let inside = lane % blocks < {{ blocks // part.short_lanes * part.short_lanes }}u && long_block < {{ part.long_blocks }}u;
{% if part.n_left > part.n_right %}
        let i = long_block * {{ part.lane_left }}u;
        let j = short_block * {{ part.lane_right }}u;
{% else %}
        let i = short_block * {{ part.lane_left }}u;
        let j = long_block * {{ part.lane_right }}u;
{% endif %}
        var left_quad = ({{ part.members[0].shift }}u + i) / 4u;
        var right_quad = ({{ part.members[0].right_column }}u + j) / 4u;
{% for m in part.members[1:] %}
        if (i >= {{ m.first }}u) {
            left_quad = ({{ m.shift }}u + i) / 4u;
            right_quad = ({{ m.right_column }}u + j) / 4u;
        }
{% endfor %}
{% if part.masked %}
        let matrix = matrix_keys[min(i / {{ rank }}u, 3u)];
{% for b in range(quads) %}
        let key_{{ b }} = quad_key(matrix, right_quad + {{ b }}u);
{% endfor %}
{% endif %}
        let last = select(0u, min(first + stretch, extent.rows), inside);
        let at = {{ part.start }}u + (i * {{ part.n_right }}u + j) / 4u;
{% for a in range(part.lane_left) %}
{% for b in range(quads) %}
        var sum_{{ a }}_{{ b }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% if splits > 1 %}
        // The old values come while the rows are summed.
{% for t in range((n_sums + splits - 1) // splits) %}
        let n_{{ t }} = split + {{ t * splits }}u;
        let at_{{ t }} = at + n_{{ t }} / {{ quads }}u * {{ part.n_right // 4 }}u + n_{{ t }} % {{ quads }}u;
        let own_{{ t }} = inside{{ " && n_%d < %du" % (t, n_sums) if (t + 1) * splits > n_sums }};
        var new_{{ t }} = vec4<f32>();
        if (own_{{ t }}) { new_{{ t }} = gradient_at(group.z, at_{{ t }}); }
{% endfor %}
{% endif %}
        var m = first + split;
{% if unroll > 1 %}
        for (; m + {{ (unroll - 1) * splits }}u < last; m += {{ unroll * splits }}u) {
{{ add_rows(part, unroll) }}
        }
{% endif %}
        for (; m < last; m += splits) {
{{ add_rows(part, 1) }}
        }
{% if splits == 1 %}
        if (!inside) { return; }
{% for a in range(part.lane_left) %}
{% for b in range(quads) %}
        set_gradient(group.z, at + {{ a * part.n_right // 4 + b }}u, gradient_at(group.z, at + {{ a * part.n_right // 4 + b }}u) + {{ part.scale }} * sum_{{ a }}_{{ b }});
{% endfor %}
{% endfor %}
{% else %}
{% for a in range(part.lane_left) %}
{% for b in range(quads) %}
        sums[{{ (a * quads + b) * lanes }}u + lane] = sum_{{ a }}_{{ b }};
{% endfor %}
{% endfor %}
        workgroupBarrier();
{% for t in range((n_sums + splits - 1) // splits) %}
        if (own_{{ t }}) {
            let from_{{ t }} = n_{{ t }} * {{ lanes }}u + lane % blocks;
            var sum = sums[from_{{ t }}];
{% for s in range(1, splits) %}
            sum += sums[from_{{ t }} + {{ s }}u * blocks];
{% endfor %}
            set_gradient(group.z, at_{{ t }}, new_{{ t }} + {{ part.scale }} * sum);
        }
{% endfor %}
{% endif %}
{% endfor %}
    }
}
