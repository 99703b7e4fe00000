{#
matmul_matrix.wgsl with factors of f32, each a pair of f16 (parts/pairs.wgsl). A product is three of theirs; lower times
lower would be below 2^-22 of it. What is infinite becomes NaN, times a lower half of 0. Rows of x and columns of the
output in W are scaled by powers of two. `prepared`: both sides were paired beforehand, and are loaded as the tiles hold them.
#}
{% from "parts/pairs.wgsl" import scaling, pairing %}
{% macro declare() %}
{{ scaling() }}
{% if not prepared %}
{{ pairing() }}
{% endif %}

// number · 2^exponent, for exponents up to 252 either way.
fn scaled(number: f32, exponent: i32) -> f32 {
    let half = exponent / 2;
    return number * power(half) * power(exponent - half);
}

// The power of two of a row of x, of a column of the output.
fn row_exponent(row: u32) -> i32 { return exponent_for(x_largest[{{ "row" if rows_fit else "min(row, extent.rows - 1u)" }}]); }
{% if not w_exact %}
fn column_exponent(column: u32) -> i32 {
    return exponent_for(w_largest[{{ "contraction + " if transposed }}min(column, n_columns - 1u)]);
}
{% endif %}
{% if members %}

// Four numbers of a row of the low-rank part's tiles, four of a column.
fn low_numbers(row: u32, step: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(x_tile[row * {{ x_step // 4 }}u + step / 4u]);
}
fn factor_numbers(step: u32, column: u32) -> vec4<f32> {
    let at = step * {{ (tile_columns + pad) // 4 }}u + column / 4u;
    let word = column % 4u;
    return bitcast<vec4<f32>>(vec4(
        w_tile[at][word],
{% for c in range(1, 4) %}
        w_tile[at + {{ c * (tile_columns + pad) // 4 }}u][word],
{% endfor %}
    ));
}
{% endif %}
{% if not emulated %}

// A number of a fragment in the tiles' memory.
fn of_x_tile(at: u32) -> f32 { return bitcast<f32>(x_tile[at / 4u][at % 4u]); }
fn of_w_tile(at: u32) -> f32 { return bitcast<f32>(w_tile[at / 4u][at % 4u]); }

// A subgroup's fragment in the stage, number by number.
fn stage_place(place: u32) -> u32 { return place / {{ n }}u * {{ stage_columns }}u + place % {{ n }}u; }
fn stage_number(stage_from: u32, place: u32, number: f32) {
    let at = 4u * stage_from + stage_place(place);
    stage[at / 4u][at % 4u] = number;
}
{% endif %}

{% endmacro %}

{# Fragments of a subgroup that the memory of either tile holds beside those of the others. #}
{% set fragment_quads = m * n // 4 %}
{% set x_places = x_lower * 2 // (subgroups_x * subgroups_y * fragment_quads) %}
{% set w_places = w_lower * (2 if members or not w_exact else 1) // (subgroups_x * subgroups_y * fragment_quads) %}

{# The tile whose memory a fragment passes, the `number`th of those that do so together, and where, in quads. #}
{% macro passed_tile(number) -%}
{{ "x_tile" if number < x_places else "w_tile" }}
{%- endmacro %}
{% macro passed_at(number) -%}
{% set places, place = (x_places, number) if number < x_places else (w_places, number - x_places) %}
(team * {{ places }}u + {{ place }}u) * {{ fragment_quads }}u
{%- endmacro %}

{# total += sum, and sum begins anew: through the memory of the tiles, as many fragments at a time as it holds. #}
{% macro carry_sums() %}
{% if emulated %}
            for (var at = 0u; at < {{ parts.fragments * parts.held }}u; at++) {
                totals[at] += sums[at];
                sums[at] = 0.0;
            }
{% else %}
{% for first in range(0, parts.fragments, x_places + w_places) %}
{% set together = range(first, [first + x_places + w_places, parts.fragments] | min) %}
            workgroupBarrier(); // the tiles have been read
{% for at in together %}
{% set fragment = "%d_%d" % (at // column_fragments, at % column_fragments) %}
            subgroupMatrixStore<row_major>(&{{ passed_tile(at - first) }}, {{ passed_at(at - first) }}, sum_{{ fragment }}, {{ n // 4 }}u);
            sum_{{ fragment }} = {{ parts.result_type }}();
{% endfor %}
            workgroupBarrier();
{% for at in together %}
{% set fragment = "%d_%d" % (at // column_fragments, at % column_fragments) %}
{% for h in range(parts.held) %}
            total_{{ fragment }}_{{ h }} += of_{{ passed_tile(at - first) }}(4u * {{ passed_at(at - first) }} + {{ h * subgroup_lanes }}u + team_lane);
{% endfor %}
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# What a number is without its scale. #}
{% macro unscaled(i, j, place, total) -%}
{% set row = "first_row + left_row + %s + (%s) / %du" % (i, place, n) %}
{% set column = "first_column + right_column + %s + (%s) %% %du" % (j, place, n) %}
scaled({{ total }}, -row_exponent({{ row }}){{ "" if w_exact else " - column_exponent(%s)" % column }})
{%- endmacro %}

{# total becomes whole and unscaled. #}
{% macro finish_sums() %}
{{ carry_sums() }}
{% if emulated %}
    for (var at = 0u; at < {{ parts.fragments * parts.held }}u; at++) {
        let place = at % {{ parts.held }}u * {{ subgroup_lanes }}u + team_lane;
        let i = at / {{ column_fragments * parts.held }}u * {{ m }}u;
        let j = at / {{ parts.held }}u % {{ column_fragments }}u * {{ n }}u;
        totals[at] = {{ unscaled("i", "j", "place", "totals[at]") }};
    }
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
{% for h in range(parts.held) %}
    total_{{ i }}_{{ j }}_{{ h }} = {{ unscaled("%du" % (i * m), "%du" % (j * n), "%du + team_lane" % (h * subgroup_lanes), "total_%d_%d_%d" % (i, j, h)) }};
{% endfor %}
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Adds the products of the low-rank part's tiles to the totals. A lane's numbers of a fragment are of one column. #}
{% macro multiply_low() %}
{% if emulated %}
        for (var at = 0u; at < {{ parts.fragments * parts.held }}u; at++) {
            let i = at / {{ column_fragments * parts.held }}u;
            let j = at / {{ parts.held }}u % {{ column_fragments }}u;
            let place = at % {{ parts.held }}u * {{ subgroup_lanes }}u + team_lane;
            let row = left_row + i * {{ m }}u + place / {{ n }}u;
            let column = right_column + j * {{ n }}u + place % {{ n }}u;
            for (var step = 0u; step < {{ low_steps }}u; step += 4u) {
                totals[at] += dot(low_numbers(row, step), factor_numbers(step, column));
            }
        }
{% else %}
        for (var step = 0u; step < {{ low_steps }}u; step += 4u) {
{% for j in range(column_fragments) %}
            let factor_{{ j }} = factor_numbers(step, right_column + {{ j * n }}u + team_lane % {{ n }}u);
{% endfor %}
{% for i in range(row_fragments) %}
{% for h in range(parts.held) %}
            {
                let numbers = low_numbers(left_row + {{ i * m }}u + ({{ h * subgroup_lanes }}u + team_lane) / {{ n }}u, step);
{% for j in range(column_fragments) %}
                total_{{ i }}_{{ j }}_{{ h }} += dot(numbers, factor_{{ j }});
{% endfor %}
            }
{% endfor %}
{% endfor %}
        }
{% endif %}
{% endmacro %}
