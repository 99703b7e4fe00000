{#
The sums of matmul_matrix.wgsl: fragments on matrix units, sum_I_J, one variable each. In plain WGSL
`sums` has all of a lane's numbers, so that there is little to compile: the offsets are the same.
A file takes these with `import … with context`.

Paired, factors are pairs of f16 (parts/matmul_matrix_pairs.wgsl), whose three products have one sum. The units
truncate where they add, so what it has after `carry` steps is added to `total`, plain numbers of each lane.
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
{% set fragments = row_fragments * column_fragments %}
{% set result_type = "subgroup_matrix_result<f32, %d, %d>" % (n, m) %}

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
    var sums = array<f32, {{ fragments * held }}>();
{% if paired %}
    var totals = array<f32, {{ fragments * held }}>();
{% endif %}
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
    var sum_{{ i }}_{{ j }} = {{ result_type }}();
{% for h in range(held if paired else 0) %}
    var total_{{ i }}_{{ j }}_{{ h }} = 0.0;
{% endfor %}
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{% macro load_left(i, step, half) -%}
subgroupMatrixLoad<{{ left_type }}, row_major>(&x_tile, left_from + {{ i * left_next + step * left_step + half }}u, {{ x_step // 8 }}u)
{%- endmacro %}
{% macro load_right(j, step, half) -%}
subgroupMatrixLoad<{{ right_type }}, {{ right_order }}>(&w_tile, right_from + {{ j * right_next + step * right_step + half }}u, {{ w_step // 8 }}u)
{%- endmacro %}
{% macro multiply(i, j, left, right) -%}
sum_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate({{ left }}_{{ i }}, {{ right }}_{{ j }}, sum_{{ i }}_{{ j }});
{%- endmacro %}

{# Multiplies the first `steps` of the tiles' depth into the fragments. `exact`: W has no lower halves. #}
{% macro multiply_tiles(steps, exact=false) %}
{% if emulated %}
        for (var step = 0u; step < {{ steps // k }}u; step++) {
            for (var at = 0u; at < {{ row_fragments * column_fragments * held }}u; at++) {
                let i = at / {{ column_fragments * held }}u;
                let j = at / {{ held }}u % {{ column_fragments }}u;
                let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
                let left = left_from + i * {{ left_next }}u + step * {{ left_step }}u;
                let right = right_from + j * {{ right_next }}u + step * {{ right_step }}u;
                sums[at] += product(left, right, place / {{ n }}u, place % {{ n }}u);
{% if paired %}
                sums[at] += product(left + {{ x_lower }}u, right, place / {{ n }}u, place % {{ n }}u);
{% if not exact %}
                sums[at] += product(left, right + {{ w_lower }}u, place / {{ n }}u, place % {{ n }}u);
{% endif %}
{% endif %}
            }
        }
{% else %}
{% for step in range(steps // k) %}
        {
{% for i in range(row_fragments) %}
            let left_{{ i }} = {{ load_left(i, step, 0) }};
{% if paired %}
            let lower_left_{{ i }} = {{ load_left(i, step, x_lower) }};
{% endif %}
{% endfor %}
{% for j in range(column_fragments) %}
            let right_{{ j }} = {{ load_right(j, step, 0) }};
{% if paired and not exact %}
            let lower_right_{{ j }} = {{ load_right(j, step, w_lower) }};
{% endif %}
{% for i in range(row_fragments) %}
            {{ multiply(i, j, "left", "right") }}
{% endfor %}
{# One after the other, products into the same fragment would wait for each other. #}
{% if paired %}
{% for i in range(row_fragments) %}
            {{ multiply(i, j, "lower_left", "right") }}
{% endfor %}
{% for i in range(row_fragments if not exact else 0) %}
            {{ multiply(i, j, "left", "lower_right") }}
{% endfor %}
{% endif %}
{% endfor %}
        }
{% endfor %}
{% endif %}
{% endmacro %}

{# Before add_masked: the keys of the rows that a lane masks. #}
{% macro fetch_row_keys() %}
{% for i in range(row_fragments if not emulated else 0) %}
{% for q in range((stage_quads + lanes - 1) // lanes) %}
    let row_key_{{ i }}_{{ q }} = row_key_of(lane + {{ q * lanes }}u, first_row + {{ i * m }}u);
{% endfor %}
{% endfor %}
{% endmacro %}

{# Adds the product of the first `steps` of the tiles' depth under a member's mask, a fragment of every subgroup at a
   time. `fresh`: nothing has been added before. #}
{% macro add_masked(steps, member, fresh) %}
{% set quads = (stage_quads + lanes - 1) // lanes %}
{% if emulated %}
        for (var i = 0u; i < {{ row_fragments }}u; i++) {
            for (var j = 0u; j < {{ column_fragments }}u; j++) {
                workgroupBarrier();
                for (var at = 0u; at < {{ held }}u; at++) {
                    let place = at * {{ subgroup_lanes }}u + team_lane;
                    let column = place % {{ n }}u;
                    var own = 0.0;
                    for (var step = 0u; step < {{ steps // k }}u; step++) {
                        let left = left_from + i * {{ left_next }}u + step * {{ left_step }}u;
                        let right = right_from + j * {{ right_next }}u + step * {{ right_step }}u;
                        own += product(left, right, place / {{ n }}u, column);
                    }
                    stage[stage_from + place / {{ n }}u * {{ stage_columns // 4 }}u + column / 4u][column % 4u] = own;
                }
                workgroupBarrier();
                for (var at = lane; at < {{ stage_quads }}u; at += {{ lanes }}u) {
                    let row_key = row_key_of(at, first_row + i * {{ m }}u);
                    let kept_here = kept_in_stage(at, row_key, {{ member }}u, first_column + j * {{ n }}u);
                    stage[at] = select(vec4(0.0), {{ dropout.scale }} * stage[at], kept_here);
                }
                workgroupBarrier();
                for (var at = 0u; at < {{ held }}u; at++) {
                    let place = at * {{ subgroup_lanes }}u + team_lane;
                    let column = place % {{ n }}u;
                    sums[(i * {{ column_fragments }}u + j) * {{ held }}u + at] += stage[stage_from + place / {{ n }}u * {{ stage_columns // 4 }}u + column / 4u][column % 4u];
                }
            }
        }
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
        {
            // Masks first: they wait for no barrier.
{% for q in range(quads) %}
            let at_{{ q }} = lane + {{ q * lanes }}u;
            let kept_{{ q }} = kept_in_stage(at_{{ q }}, row_key_{{ i }}_{{ q }}, {{ member }}u, first_column + {{ j * n }}u);
{% endfor %}
            var own = {{ result_type }}();
{% for step in range(steps // k) %}
            {
                let left = {{ load_left(i, step, 0) }};
                let right = {{ load_right(j, step, 0) }};
                own = subgroupMatrixMultiplyAccumulate(left, right, own);
            }
{% endfor %}
            workgroupBarrier(); // the stage has been read
            subgroupMatrixStore<row_major>(&stage, stage_from, own, {{ stage_columns // 4 }}u);
            workgroupBarrier();
{% for q in range(quads) %}
            var masked_{{ q }} = vec4<f32>();
{% set inside = "if (at_%d < %du) " % (q, stage_quads) if (q + 1) * lanes > stage_quads else "" %}
            {{ inside }}{ masked_{{ q }} = select(vec4(0.0), {{ dropout.scale }} * stage[at_{{ q }}], kept_{{ q }}); }
{% endfor %}
{% if not fresh %}
            workgroupBarrier();
            subgroupMatrixStore<row_major>(&stage, stage_from, sum_{{ i }}_{{ j }}, {{ stage_columns // 4 }}u);
            workgroupBarrier();
{% endif %}
{% for q in range(quads) %}
{% set inside = "if (at_%d < %du) " % (q, stage_quads) if (q + 1) * lanes > stage_quads else "" %}
            {{ inside }}{ stage[at_{{ q }}] {{ "=" if fresh else "+=" }} masked_{{ q }}; }
{% endfor %}
            workgroupBarrier();
            sum_{{ i }}_{{ j }} = subgroupMatrixLoad<{{ result_type }}, row_major>(&stage, stage_from, {{ stage_columns // 4 }}u);
        }
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Writes the sums out, or totals where there are some, a fragment of every subgroup at a time. #}
{% macro write_sums() %}
{% if emulated %}
    for (var i = 0u; i < {{ row_fragments }}u; i++) {
        for (var j = 0u; j < {{ column_fragments }}u; j++) {
            workgroupBarrier();
            for (var at = 0u; at < {{ held }}u; at++) {
                let place = at * {{ subgroup_lanes }}u + team_lane;
                let column = place % {{ n }}u;
                stage[stage_from + place / {{ n }}u * {{ stage_columns // 4 }}u + column / 4u][column % 4u] = {{ "totals" if paired else "sums" }}[(i * {{ column_fragments }}u + j) * {{ held }}u + at];
            }
            workgroupBarrier();
            store_stage(lane, first, own, vec2(j * {{ n }}u, i * {{ m }}u), group.z);
        }
    }
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
    workgroupBarrier();
{% if paired %}
{% for h in range(held) %}
    stage_number(stage_from, {{ h * subgroup_lanes }}u + team_lane, total_{{ i }}_{{ j }}_{{ h }});
{% endfor %}
{% else %}
    subgroupMatrixStore<row_major>(&stage, stage_from, sum_{{ i }}_{{ j }}, {{ stage_columns // 4 }}u);
{% endif %}
    workgroupBarrier();
    store_stage(lane, first, own, vec2({{ j * n }}u, {{ i * m }}u), group.z);
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}
