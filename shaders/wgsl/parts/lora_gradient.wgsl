{# The gradients of lora_gradient.wgsl: workgroup `tile_index` of a slice. Who includes this declares `sums`
   [most_sums · lanes] and the bindings. #}
{% set lanes = blocks * splits %}
const blocks = {{ blocks }}u; // of one workgroup
const splits = {{ splits }}u;

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
            let r_{{ u }}_{{ b }} = {{ "after_dropout(" if part.masked }}vec4<f32>({{ part.right }}[(m + {{ u * splits }}u) * {{ part.right_stride // 4 }}u + right_quad + {{ b }}u]){{ ", row_key_%d, key_%d)" % (u, b) if part.masked }};
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

fn add_gradients(tile_index: u32, slice: u32, lane: u32) {
    let split = lane / blocks;
    let stretch = (extent.rows + {{ n_slices - 1 }}u) / {{ n_slices }}u;
    let first = slice * stretch;
{% for part in parts %}
{% set quads = part.lane_right // 4 %}
{% set n_sums = part.lane_left * quads %}
    {{ "if (tile_index < %du) {" % part.n_groups if loop.first else "} else {" }}
{% set short_groups = part.short_blocks // part.short_lanes %}
        let tile = {{ "tile_index" if loop.first else "tile_index - %du" % parts[0].n_groups }};
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
        if (own_{{ t }}) { new_{{ t }} = gradient_at(slice, at_{{ t }}); }
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
        set_gradient(slice, at + {{ a * part.n_right // 4 + b }}u, gradient_at(slice, at + {{ a * part.n_right // 4 + b }}u) + {{ part.scale }} * sum_{{ a }}_{{ b }});
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
            set_gradient(slice, at_{{ t }}, new_{{ t }} + {{ part.scale }} * sum);
        }
{% endfor %}
{% endif %}
{% endfor %}
    }
}
