{#
The sums of matmul_matrix.wgsl: fragments on matrix units, sum_I_J, one variable each. In plain WGSL
`sums` has all of a lane's numbers, so that there is little to compile: the offsets are the same.
A file takes these with `import … with context`.
#}
{% set held = m * n // subgroup_lanes %}
{% set left_type = "subgroup_matrix_left<f16, %d, %d>" % (k, m) %}
{% set right_type = "subgroup_matrix_right<f16, %d, %d>" % (n, k) %}
{% set right_order = "row_major" if transposed else "col_major" %}
{# Eights of the tiles between fragments: down x_tile, along w_tile, and to the next step of either. #}
{% set left_next = m * x_step // 8 %}
{% set right_next = n // 8 if transposed else n * w_step // 8 %}
{% set left_step = k // 8 %}
{% set right_step = k * w_step // 8 if transposed else k // 8 %}

{% macro product_of_fragments() %}
{% if emulated %}

// A row of the left fragment at `left` times a column of the right one at `right`.
fn product(left: u32, right: u32, row: u32, column: u32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < {{ k }}u; i++) {
        let a = x_tile[left + row * {{ x_step // 8 }}u + i / 8u][i / 2u % 4u];
{% if transposed %}
        let b = w_tile[right + i * {{ w_step // 8 }}u + column / 8u][column / 2u % 4u];
        sum += unpack2x16float(a)[i % 2u] * unpack2x16float(b)[column % 2u];
{% else %}
        let b = w_tile[right + column * {{ w_step // 8 }}u + i / 8u][i / 2u % 4u];
        sum += unpack2x16float(a)[i % 2u] * unpack2x16float(b)[i % 2u];
{% endif %}
    }
    return sum;
}
{% endif %}
{% endmacro %}

{% macro declare_sums() %}
{% if emulated %}
    var sums = array<f32, {{ row_fragments * column_fragments * held }}>();
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
    var sum_{{ i }}_{{ j }} = subgroup_matrix_result<f32, {{ n }}, {{ m }}>();
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Multiplies the first `steps` of the tiles' depth into the fragments. #}
{% macro multiply_tiles(steps) %}
{% if emulated %}
        for (var step = 0u; step < {{ steps // k }}u; step++) {
            for (var at = 0u; at < {{ row_fragments * column_fragments * held }}u; at++) {
                let i = at / {{ column_fragments * held }}u;
                let j = at / {{ held }}u % {{ column_fragments }}u;
                let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
                let left = left_from + i * {{ left_next }}u + step * {{ left_step }}u;
                let right = right_from + j * {{ right_next }}u + step * {{ right_step }}u;
                sums[at] += product(left, right, place / {{ n }}u, place % {{ n }}u);
            }
        }
{% else %}
{% for step in range(steps // k) %}
        {
{% for i in range(row_fragments) %}
            let left_{{ i }} = subgroupMatrixLoad<{{ left_type }}, row_major>(&x_tile, left_from + {{ i * left_next + step * left_step }}u, {{ x_step // 8 }}u);
{% endfor %}
{% for j in range(column_fragments) %}
            let right_{{ j }} = subgroupMatrixLoad<{{ right_type }}, {{ right_order }}>(&w_tile, right_from + {{ j * right_next + step * right_step }}u, {{ w_step // 8 }}u);
{% for i in range(row_fragments) %}
            sum_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate(left_{{ i }}, right_{{ j }}, sum_{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% endif %}
{% endmacro %}

{# Writes the sums out, a fragment of every subgroup at a time. #}
{% macro write_sums() %}
{% if emulated %}
    for (var i = 0u; i < {{ row_fragments }}u; i++) {
        for (var j = 0u; j < {{ column_fragments }}u; j++) {
            workgroupBarrier();
            for (var at = 0u; at < {{ held }}u; at++) {
                let place = at * {{ subgroup_lanes }}u + team_lane;
                let column = place % {{ n }}u;
                stage[stage_from + place / {{ n }}u * {{ stage_columns // 4 }}u + column / 4u][column % 4u] = sums[(i * {{ column_fragments }}u + j) * {{ held }}u + at];
            }
            workgroupBarrier();
            store_stage(lane, first, own, vec2(j * {{ n }}u, i * {{ m }}u), group.z);
        }
    }
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
    workgroupBarrier();
    subgroupMatrixStore<row_major>(&stage, stage_from, sum_{{ i }}_{{ j }}, {{ stage_columns // 4 }}u);
    workgroupBarrier();
    store_stage(lane, first, own, vec2({{ j * n }}u, {{ i * m }}u), group.z);
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}
