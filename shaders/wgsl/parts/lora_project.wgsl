{# The projection of lora_project.wgsl: workgroup `index` of it. Who includes this declares `lanes`, `sums`
   [lane_sums · lanes] and the bindings `{{ x_name }}`, factor and `{{ z_name }}`. #}
{% set quads = lane_columns // 4 %}
{% set lane_sums = lane_rows * quads %}
{% set lanes = splits * column_lanes * row_lanes %}
{% set parts = [splits // 8, 1] | max %}
{% set block_rows = lane_rows * row_lanes %}
{% set block_columns = lane_columns * column_lanes %}
{% set n_sums = lane_sums * column_lanes * row_lanes %}
const member_blocks = {{ columns // block_columns }}u; // blocks of columns of a member
const column_blocks = {{ members | length * (columns // block_columns) }}u;


{# Adds `count` steps of the contraction from k on; all are loaded before the first is used. #}
{% macro add_steps(count) %}
{% for u in range(count) %}
{% if dropout %}
        let key_{{ u }} = quad_key(matrix, k / 4u + {{ u * splits }}u);
{% endif %}
{% for i in range(lane_rows) %}
        let v_{{ u }}_{{ i }} = {{ "after_dropout(" if dropout }}vec4<f32>({{ x_name }}[x_{{ i }} + k / 4u + {{ u * splits }}u]){{ ", row_key_%d, key_%d)" % (i, u) if dropout }};
{% endfor %}
{% if transposed %}
        let at_{{ u }} = ((factor_row + k + {{ 4 * u * splits }}u) * {{ factor_stride }}u + column) / 4u;
{% for q in range(4) %}
{% for c in range(quads) %}
        let f_{{ u }}_{{ q }}_{{ c }} = factor[at_{{ u }} + {{ q * factor_stride // 4 + c }}u];
{% endfor %}
{% endfor %}
{% else %}
        let at_{{ u }} = ((factor_row + column) * {{ factor_stride }}u + k) / 4u + {{ u * splits }}u;
{% for j in range(lane_columns) %}
        let f_{{ u }}_{{ j }} = factor[at_{{ u }} + {{ j * factor_stride // 4 }}u];
{% endfor %}
{% endif %}
{% endfor %}
{% for u in range(count) %}
{% for c in range(quads) %}
{% for i in range(lane_rows) %}
{% if transposed %}
{% for q in range(4) %}
        sum_{{ i }}_{{ c }} += v_{{ u }}_{{ i }}[{{ q }}] * f_{{ u }}_{{ q }}_{{ c }};
{% endfor %}
{% else %}
        sum_{{ i }}_{{ c }} += vec4({% for j in range(4) %}dot(v_{{ u }}_{{ i }}, f_{{ u }}_{{ 4 * c + j }}){{ ", " if not loop.last }}{% endfor %});
{% endif %}
{% endfor %}
{% endfor %}
{% endfor %}
{% endmacro %}

fn project(index: u32, lane: u32) {
    let first_row = index / column_blocks * {{ block_rows }}u;
    if (first_row >= extent.rows) { return; }
    let member = index % column_blocks / member_blocks;
    let first_column = index % member_blocks * {{ block_columns }}u; // within the member
    let column = first_column + lane % {{ column_lanes }}u * {{ lane_columns }}u;
    let split = lane / {{ column_lanes }}u % {{ splits }}u;
    let lane_row = first_row + lane / {{ column_lanes * splits }}u * {{ lane_rows }}u;
    var x_column = {{ members[0].x_column }}u;
    var factor_row = {{ members[0].factor_row }}u;
    var length = {{ members[0].length }}u;
{% set scaled = members | map(attribute="scale") | unique | list | length > 1 %}
{% if scaled %}
    var scale = {{ members[0].scale }};
{% endif %}
{% for m in members[1:] %}
    if (member == {{ loop.index }}u) {
        x_column = {{ m.x_column }}u;
        factor_row = {{ m.factor_row }}u;
        length = {{ m.length }}u;
{% if scaled %}
        scale = {{ m.scale }};
{% endif %}
    }
{% endfor %}
{% if dropout %}
    let matrix = matrix_keys[member];
{% endif %}
{% for i in range(lane_rows) %}
{% if dropout %}
    let row_key_{{ i }} = row_keys[min(lane_row + {{ i }}u, extent.rows - 1u)];
{% endif %}
    let x_{{ i }} = (min(lane_row + {{ i }}u, extent.rows - 1u) * {{ x_stride }}u + x_column) / 4u;
{% for c in range(quads) %}
    var sum_{{ i }}_{{ c }} = vec4<f32>();
{% endfor %}
{% endfor %}

    var k = 4u * split;
{% if unroll > 1 %}
    for (; k + {{ (unroll - 1) * 4 * splits }}u < length; k += {{ unroll * 4 * splits }}u) {
{{ add_steps(unroll) }}
    }
    // What is left, in as few rounds of loads as it can be.
{% for count in (16, 8, 4, 2) if count < unroll %}
    if (k + {{ (count - 1) * 4 * splits }}u < length) {
{{ add_steps(count) }}
        k += {{ count * 4 * splits }}u;
    }
{% endfor %}
    if (k < length) {
{{ add_steps(1) }}
    }
{% else %}
    for (; k < length; k += {{ 4 * splits }}u) {
{{ add_steps(1) }}
    }
{% endif %}

{% for i in range(lane_rows) %}
{% for c in range(quads) %}
    sums[{{ (i * quads + c) * lanes }}u + lane] = sum_{{ i }}_{{ c }};
{% endfor %}
{% endfor %}
    workgroupBarrier();
    // The sums of splits s of a block's part lie at sums[base + s · column_lanes].
{% set group_lanes = column_lanes * splits %}
{% if parts > 1 %}
{% set group_tasks = column_lanes * parts %}
    for (var task = lane; task < {{ n_sums * parts }}u; task += lanes) {
        let part = task / {{ group_tasks }}u * {{ group_lanes }}u + task % {{ group_tasks }}u;
        var part_sum = sums[part];
{% for t in range(parts, splits, parts) %}
        part_sum += sums[part + {{ t * column_lanes }}u];
{% endfor %}
        sums[part] = part_sum; // where no other lane reads
    }
    workgroupBarrier();
{% endif %}
    for (var n = lane; n < {{ n_sums }}u; n += lanes) {
        let base = n / {{ column_lanes }}u * {{ group_lanes }}u + n % {{ column_lanes }}u;
        var sum = sums[base];
{% for t in range(1, parts if parts > 1 else splits) %}
        sum += sums[base + {{ t * column_lanes }}u];
{% endfor %}
        // n counts columns of lanes, then their rows, then a lane's vectors.
        let vector = n / {{ column_lanes * row_lanes }}u;
        let row = first_row + n / {{ column_lanes }}u % {{ row_lanes }}u * {{ lane_rows }}u + vector / {{ quads }}u;
        if (row < extent.rows) {
            let at = (row * {{ members | length * columns }}u + member * {{ columns }}u + first_column) / 4u;
            {{ z_name }}[at + n % {{ column_lanes }}u * {{ quads }}u + vector % {{ quads }}u] = {{ "scale" if scaled else members[0].scale }} * sum;
        }
    }
}
