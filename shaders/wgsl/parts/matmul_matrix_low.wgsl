{#
The low-rank part of matmul_matrix.wgsl: the sums of each adapted member, some ranks at a time. In
stretches it goes with the first. Paired, it is plain f32: the tiles' memory holds x [tile_rows][x_step] and
the factor [low_steps][factor_step]. With dropout (transposed, not paired) a member's share of each fragment passes
through the stage, where its mask is put on it.
#}
{% set factor_step = tile_columns + pad %}
{% macro of_x(i) %}{% if (i + 1) * lanes > low_steps * tile_rows // 8 %}if (low_unit_{{ i }} < {{ low_steps * tile_rows // 8 }}u){% endif %}{% endmacro %}
{% macro of_w(i) %}{% if (i + 1) * lanes > low_steps * tile_columns // 8 %}if (factor_unit_{{ i }} < {{ low_steps * tile_columns // 8 }}u){% endif %}{% endmacro %}
{% set factor_scale = "powers[factor_power_at] * " if powered else "" %}
{% if splits > 1 %}
    if (group.z == 0u) {
{% endif %}
{% if dropout and not paired %}
{{ parts.fetch_row_keys() }}
{% endif %}
{% for member in members %}
{% if not transposed %}
    if (first_column < {{ member.stop }}u && first_column + tile_columns > {{ member.start }}u) {
{% endif %}
    for (var r = 0u; r < {{ rank }}u; r += {{ low_steps }}u) {
        // All loads first: each would otherwise wait for the one before.
{% for i in range(low_x_units) %}
        let low_unit_{{ i }} = lane + {{ i * lanes }}u;
        let low_eight_{{ i }} = low_unit_{{ i }} % {{ low_steps // 8 }}u;
        let low_row_{{ i }} = low_unit_{{ i }} / {{ low_steps // 8 }}u;
        let low_at_{{ i }} = (min(first_row + low_row_{{ i }}, last_row) * {{ low_stride }}u + {{ member.low_start }}u + r) / 4u + 2u * low_eight_{{ i }};
{# The power of a member's rows goes from low, where it is too large for f16, to the factor. #}
{% set low_back = "powers[factor_power_at] / powers[%du] * " % member.start if low_carries else "" %}
{% set low_scale = ("x_power(first_row + low_row_%d) * " % i if x_scaled else "") ~ low_back %}
        var low_a_{{ i }} = vec4<f32>();
        var low_b_{{ i }} = vec4<f32>();
        if (r + 8u * low_eight_{{ i }} < {{ rank }}u) { low_a_{{ i }} = {{ low_scale }}low[low_at_{{ i }}]; }
        if (r + 8u * low_eight_{{ i }} + 4u < {{ rank }}u) { low_b_{{ i }} = {{ low_scale }}low[low_at_{{ i }} + 1u]; }
{% endfor %}
{% for i in range(low_w_units) %}
        let factor_unit_{{ i }} = lane + {{ i * lanes }}u;
        var factor_a_{{ i }} = vec4<f32>();
        var factor_b_{{ i }} = vec4<f32>();
{% if transposed %}
        let factor_eight_{{ i }} = factor_unit_{{ i }} % {{ tile_columns // 8 }}u;
        let factor_line_{{ i }} = factor_unit_{{ i }} / {{ tile_columns // 8 }}u;
        let factor_column_{{ i }} = first_column + 8u * factor_eight_{{ i }};
        let factor_at_{{ i }} = (({{ member.low_start }}u + r + factor_line_{{ i }}) * n_columns + factor_column_{{ i }}) / 4u;
        if (r + factor_line_{{ i }} < {{ rank }}u) {
            if (factor_column_{{ i }} < n_columns) { factor_a_{{ i }} = {{ factor_scale }}factor[factor_at_{{ i }}]; }
            if (factor_column_{{ i }} + 4u < n_columns) { factor_b_{{ i }} = {{ factor_scale }}factor[factor_at_{{ i }} + 1u]; }
        }
{% else %}
        let factor_eight_{{ i }} = factor_unit_{{ i }} % {{ low_steps // 8 }}u;
        let factor_line_{{ i }} = factor_unit_{{ i }} / {{ low_steps // 8 }}u;
        let factor_column_{{ i }} = first_column + factor_line_{{ i }};
        let factor_at_{{ i }} = ((factor_column_{{ i }} - {{ member.start }}u + {{ member.factor_start }}u) * {{ rank }}u + r) / 4u + 2u * factor_eight_{{ i }};
        if (factor_column_{{ i }} >= {{ member.start }}u && factor_column_{{ i }} < {{ member.stop }}u) {
            if (r + 8u * factor_eight_{{ i }} < {{ rank }}u) { factor_a_{{ i }} = {{ "powers[factor_column_%d] * " % i if low_carries else factor_scale }}{{ scale }} * factor[factor_at_{{ i }}]; }
            if (r + 8u * factor_eight_{{ i }} + 4u < {{ rank }}u) { factor_b_{{ i }} = {{ "powers[factor_column_%d] * " % i if low_carries else factor_scale }}{{ scale }} * factor[factor_at_{{ i }} + 1u]; }
        }
{% endif %}
{% endfor %}
        workgroupBarrier();
{% for i in range(low_x_units) %}
        {{ of_x(i) }} {
            let to = low_row_{{ i }} * {{ x_step // 8 }}u + low_eight_{{ i }};
{% if paired %}
            x_tile[2u * to] = bitcast<vec4<u32>>(low_a_{{ i }});
            x_tile[2u * to + 1u] = bitcast<vec4<u32>>(low_b_{{ i }});
{% else %}
            x_tile[to] = vec4(packed(low_a_{{ i }}), packed(low_b_{{ i }}));
{% endif %}
        }
{% endfor %}
{% for i in range(low_w_units) %}
        {{ of_w(i) }} {
{% if not paired %}
            w_tile[factor_line_{{ i }} * {{ w_step // 8 }}u + factor_eight_{{ i }}] = vec4(packed(factor_a_{{ i }}), packed(factor_b_{{ i }}));
{% elif transposed %}
            let to = factor_line_{{ i }} * {{ factor_step // 4 }}u + 2u * factor_eight_{{ i }};
            w_tile[to] = bitcast<vec4<u32>>(factor_a_{{ i }});
            w_tile[to + 1u] = bitcast<vec4<u32>>(factor_b_{{ i }});
{% else %}
            let to = 8u * factor_eight_{{ i }} * {{ factor_step // 4 }}u + factor_line_{{ i }} / 4u;
{% for c in range(8) %}
            w_tile[to + {{ c * factor_step // 4 }}u][factor_line_{{ i }} % 4u] = bitcast<u32>(factor_{{ "ab"[c // 4] }}_{{ i }}[{{ c % 4 }}]);
{% endfor %}
{% endif %}
        }
{% endfor %}
        workgroupBarrier();
{% if paired %}
{{ pairs.multiply_low() }}
{% elif dropout %}
{{ parts.add_masked(low_steps, loop.index0, loop.first and rank <= low_steps) }}
{% else %}
{{ parts.multiply_tiles(low_steps) }}
{% endif %}
    }
{% if not transposed %}
    }
{% endif %}
{% endfor %}
{% if splits > 1 %}
    }
{% endif %}
