{# The projection of lora_project_matrix.wgsl: workgroup `index` of it. Who includes this declares `lanes`, `tiles`,
   pack_eight and the bindings `{{ x_name }}`, factor, `{{ z_name }}`, where rows of x are scaled row_largest, where those
   of a transposed factor are factor_scales, and
   with dropout what parts/dropout.wgsl asks for. #}
{% from "parts/fragments.wgsl" import left_type, right_type, result_type with context %}
{% set width = (columns + n - 1) // n * n %}
{% set x_step = depth // 8 + 1 %}
{% set f_step = width // 8 + 1 if transposed else x_step %}
{% set x_size = block_rows * x_step %}
{% set f_size = (depth if transposed else width) * f_step %}
{% set stage_size = subgroups * block_rows * width // 4 %}
{% set lanes = subgroups * subgroup_lanes %}
{% set x_units = block_rows * depth // 8 %}
{% set f_units = width * depth // 8 %}
{% set x_turns = (x_units + lanes - 1) // lanes %}
{% set f_turns = (f_units + lanes - 1) // lanes %}
{% set row_fragments = block_rows // m %}
{% set column_fragments = width // n %}
{% set held = m * n // subgroup_lanes %}
{# A member may have a scale of its own, and be several workgroups', each of some of its columns. #}
{% set scales = members | map(attribute="scale") | unique | list %}
{# Lanes that are whole lines of x keep to their columns in all turns, and so to the keys of these. #}
{% set key_turns = 1 if lanes % (depth // 8) == 0 else x_turns %}
{% set scales_x = x_scaled and x_type == "f32" %}
{% if x_scaled %}
{% from "parts/row_power.wgsl" import row_exponent %}
fn exponent_of(row: u32) -> i32 {
    return {{ row_exponent("row_largest[min(row, extent.rows - 1u)]") }};
}
fn power(exponent: i32) -> f32 { return bitcast<f32>(u32(127 + exponent) << 23u); }

{% endif %}
fn project(index: u32, lane: u32, team: u32) {
    let first_row = index / {{ members | length }}u * {{ block_rows }}u;
    if (first_row >= extent.rows) { return; }
    let member = index % {{ members | length }}u;
{% if emulated %}
    let team_lane = lane % {{ subgroup_lanes }}u;
{% endif %}
    var x_column = {{ members[0].x_column }}u;
    var factor_row = {{ members[0].factor_row }}u;
    var length = {{ members[0].length }}u;
{% if scales | length > 1 %}
    var scale = {{ members[0].scale / factor_scale }};
{% endif %}
{% for one in members[1:] %}
    if (member == {{ loop.index }}u) {
        x_column = {{ one.x_column }}u;
        factor_row = {{ one.factor_row }}u;
        length = {{ one.length }}u;
{% if scales | length > 1 %}
        scale = {{ one.scale / factor_scale }};
{% endif %}
    }
{% endfor %}
{% if dropout %}
    let matrix = matrix_keys[member / {{ pieces }}u];
{% for u in range(x_turns) %}
    let row_key_{{ u }} = row_keys[min(first_row + (lane + {{ u * lanes }}u) / {{ depth // 8 }}u, extent.rows - 1u)];
{% endfor %}
{% endif %}
{% for u in range(x_turns) %}
{% if x_by_eights %}
    var fetched_x_{{ u }} = vec4<u32>();
{% else %}
    var x_a_{{ u }} = vec4<{{ x_type }}>();
    var x_b_{{ u }} = vec4<{{ x_type }}>();
{% endif %}
{% if scales_x %}
    let x_power_{{ u }} = power(exponent_of(first_row + (lane + {{ u * lanes }}u) / {{ depth // 8 }}u));
{% endif %}
{% endfor %}
{% for u in range(f_turns) %}
    var f_a_{{ u }} = vec4<f32>();
    var f_b_{{ u }} = vec4<f32>();
{% if factor_scaled %}
    var of_column_{{ u }} = 0.0;
{% endif %}
{% endfor %}
{% if emulated %}
    var sums = array<f32, {{ row_fragments * column_fragments * held }}>();
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
    var sum_{{ i }}_{{ j }} = {{ result_type }}();
{% endfor %}
{% endfor %}
{% endif %}
{# Loads all of a tile, none behind a branch or a conversion: each would wait for the one before. What lies outside is
   read inside: past the end of the contraction, or of the columns, `convert` makes the factor zero. #}
{% macro fetch(start) %}
{% for u in range(x_turns) %}
    {
        let unit = min(lane + {{ u * lanes }}u, {{ x_units - 1 }}u);
        let at = {{ start }} + unit % {{ depth // 8 }}u * 8u;
        let row = min(first_row + unit / {{ depth // 8 }}u, extent.rows - 1u);
        let line = row * {{ x_stride }}u + x_column;
{% if x_by_eights %}
        fetched_x_{{ u }} = {{ x_name }}[(line + min(at, length - 8u)) / 8u];
{% else %}
        x_a_{{ u }} = {{ x_name }}[(line + min(at, length - 4u)) / 4u];
        x_b_{{ u }} = {{ x_name }}[(line + min(at + 4u, length - 4u)) / 4u];
{% endif %}
    }
{% endfor %}
{% for u in range(f_turns) %}
    {
        let unit = min(lane + {{ u * lanes }}u, {{ f_units - 1 }}u);
{% if transposed %}
        let at = min({{ start }} + unit / {{ width // 8 }}u, length - 1u);
        let column = unit % {{ width // 8 }}u * 8u;
        let line = (factor_row + at) * {{ factor_stride }}u;
        f_a_{{ u }} = factor[(line + min(column, {{ columns - 4 }}u)) / 4u];
        f_b_{{ u }} = factor[(line + min(column + 4u, {{ columns - 4 }}u)) / 4u];
{% if factor_scaled %}
        of_column_{{ u }} = factor_scales[x_column + at];
{% endif %}
{% else %}
        let at = {{ start }} + unit % {{ depth // 8 }}u * 8u;
        let column = min(unit / {{ depth // 8 }}u, {{ columns - 1 }}u);
        let line = (factor_row + column) * {{ factor_stride }}u;
        f_a_{{ u }} = factor[(line + min(at, length - 4u)) / 4u];
        f_b_{{ u }} = factor[(line + min(at + 4u, length - 4u)) / 4u];
{% endif %}
    }
{% endfor %}
{% endmacro %}
{# Makes of what was loaded, from step `begun` on, what the tiles take. #}
{% macro convert() %}
{% for u in range(key_turns if dropout else 0) %}
        let key_at_{{ u }} = begun / 8u + (lane + {{ u * lanes }}u) % {{ depth // 8 }}u;
{% if x_by_eights %}
        let key_{{ u }} = eight_key(matrix, key_at_{{ u }});
{% else %}
        let key_a_{{ u }} = quad_key(matrix, 2u * key_at_{{ u }});
        let key_b_{{ u }} = quad_key(matrix, 2u * key_at_{{ u }} + 1u);
{% endif %}
{% endfor %}
{% for u in range(x_turns if x_by_eights and dropout else 0) %}
        fetched_x_{{ u }} = eight_after_dropout(fetched_x_{{ u }}, row_key_{{ u }}, key_{{ u % key_turns }});
{% endfor %}
{% for u in range(x_turns if not x_by_eights else 0) %}
        var of_x_a_{{ u }} = vec4<f32>(x_a_{{ u }});
        var of_x_b_{{ u }} = vec4<f32>(x_b_{{ u }});
{% if dropout %}
        of_x_a_{{ u }} = after_dropout(of_x_a_{{ u }}, row_key_{{ u }}, key_a_{{ u % key_turns }});
        of_x_b_{{ u }} = after_dropout(of_x_b_{{ u }}, row_key_{{ u }}, key_b_{{ u % key_turns }});
{% endif %}
        let fetched_x_{{ u }} = {{ "packed(x_power_%d * of_x_a_%d, x_power_%d * of_x_b_%d)" % (u, u, u, u) if scales_x else "packed(of_x_a_%d, of_x_b_%d)" % (u, u) }};
{% endfor %}
{% for u in range(f_turns) %}
        let unit_{{ u }} = lane + {{ u * lanes }}u;
{% if transposed %}
        let used_{{ u }} = begun + unit_{{ u }} / {{ width // 8 }}u < length;
        let column_{{ u }} = unit_{{ u }} % {{ width // 8 }}u * 8u;
        let used_a_{{ u }} = used_{{ u }} && column_{{ u }} < {{ columns }}u;
        let used_b_{{ u }} = used_{{ u }} && column_{{ u }} + 4u < {{ columns }}u;
{% else %}
        let at_{{ u }} = begun + unit_{{ u }} % {{ depth // 8 }}u * 8u;
        let used_{{ u }} = unit_{{ u }} / {{ depth // 8 }}u < {{ columns }}u;
        let used_a_{{ u }} = used_{{ u }} && at_{{ u }} < length;
        let used_b_{{ u }} = used_{{ u }} && at_{{ u }} + 4u < length;
{% endif %}
{% set times = "%s * of_column_%d * " % (factor_scale, u) if factor_scaled else "%s * " % factor_scale %}
        let fetched_f_{{ u }} = packed(
            select(vec4<f32>(), {{ times }}f_a_{{ u }}, used_a_{{ u }}),
            select(vec4<f32>(), {{ times }}f_b_{{ u }}, used_b_{{ u }}),
        );
{% endfor %}
{% endmacro %}

    {{ fetch("0u") }}
    for (var begun = 0u; begun < length; begun += {{ depth }}u) {
{{ convert() }}
        workgroupBarrier();
{% for u in range(x_turns) %}
{% if (u + 1) * lanes > x_units %}
        if (lane < {{ x_units - u * lanes }}u)
{% endif %}
        {
            let unit = lane + {{ u * lanes }}u;
            tiles[unit / {{ depth // 8 }}u * {{ x_step }}u + unit % {{ depth // 8 }}u] = fetched_x_{{ u }};
        }
{% endfor %}
{% set f_line = width // 8 if transposed else depth // 8 %}
{% for u in range(f_turns) %}
{% if (u + 1) * lanes > f_units %}
        if (lane < {{ f_units - u * lanes }}u)
{% endif %}
        {
            let unit = lane + {{ u * lanes }}u;
            tiles[{{ x_size }}u + unit / {{ f_line }}u * {{ f_step }}u + unit % {{ f_line }}u] = fetched_f_{{ u }};
        }
{% endfor %}
        workgroupBarrier();
        {{ fetch("(begun + %du)" % depth) }}
{% for u in range(depth // (k * subgroups)) %}
        {
            let step = team + {{ u * subgroups }}u;
{% if emulated %}
            for (var at = 0u; at < {{ row_fragments * column_fragments * held }}u; at++) {
                let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
                let row = at / {{ column_fragments * held }}u * {{ m }}u + place / {{ n }}u;
                let column = at / {{ held }}u % {{ column_fragments }}u * {{ n }}u + place % {{ n }}u;
                for (var i = step * {{ k }}u; i < (step + 1u) * {{ k }}u; i++) {
                    let a = number(tiles[row * {{ x_step }}u + i / 8u], i);
{% if transposed %}
                    sums[at] += a * number(tiles[{{ x_size }}u + i * {{ f_step }}u + column / 8u], column);
{% else %}
                    sums[at] += a * number(tiles[{{ x_size }}u + column * {{ f_step }}u + i / 8u], i);
{% endif %}
                }
            }
{% else %}
{% for i in range(row_fragments) %}
            let left_{{ i }} = subgroupMatrixLoad<{{ left_type }}, row_major>(&tiles, {{ i * m * x_step }}u + step * {{ k // 8 }}u, {{ x_step }}u);
{% endfor %}
{% for j in range(column_fragments) %}
            {
{% if transposed %}
                let right = subgroupMatrixLoad<{{ right_type }}, row_major>(&tiles, {{ x_size + j * n // 8 }}u + step * {{ k * f_step }}u, {{ f_step }}u);
{% else %}
                let right = subgroupMatrixLoad<{{ right_type }}, col_major>(&tiles, {{ x_size + j * n * f_step }}u + step * {{ k // 8 }}u, {{ f_step }}u);
{% endif %}
{% for i in range(row_fragments) %}
                sum_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate(left_{{ i }}, right, sum_{{ i }}_{{ j }});
{% endfor %}
            }
{% endfor %}
{% endif %}
        }
{% endfor %}
    }

    workgroupBarrier();
{% if emulated %}
    for (var at = 0u; at < {{ row_fragments * column_fragments * held }}u; at++) {
        let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
        let row = at / {{ column_fragments * held }}u * {{ m }}u + place / {{ n }}u;
        let column = at / {{ held }}u % {{ column_fragments }}u * {{ n }}u + place % {{ n }}u;
        tiles[(team * {{ block_rows }}u + row) * {{ width // 4 }}u + column / 4u][column % 4u] = bitcast<u32>(sums[at]);
    }
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
    subgroupMatrixStore<row_major>(&tiles, team * {{ block_rows * width // 4 }}u + {{ (i * m * width + j * n) // 4 }}u, sum_{{ i }}_{{ j }}, {{ width // 4 }}u);
{% endfor %}
{% endfor %}
{% endif %}
    workgroupBarrier();
    for (var unit = lane; unit < {{ block_rows * columns // 4 }}u; unit += lanes) {
        let row = unit / {{ columns // 4 }}u;
        let quad = unit % {{ columns // 4 }}u;
        if (first_row + row < extent.rows) {
            var sum = bitcast<vec4<f32>>(tiles[row * {{ width // 4 }}u + quad]);
            for (var s = 1u; s < {{ subgroups }}u; s++) {
                sum += bitcast<vec4<f32>>(tiles[(s * {{ block_rows }}u + row) * {{ width // 4 }}u + quad]);
            }
            {{ z_name }}[(first_row + row) * {{ members | length * columns // 4 }}u + member * {{ columns // 4 }}u + quad] = {{ "scale" if scales | length > 1 else scales[0] / factor_scale }} * {{ "(power(-exponent_of(first_row + row)) * sum)" if x_scaled else "sum" }};
        }
    }
}
