// The quantized matmul on matrix units: tiles of both sides in workgroup memory as f16, W decoded on
// the way in, multiplied in fragments of {{ m }} × {{ k }} and {{ k }} × {{ n }} by the lanes of a subgroup together.
//
//   out[m, n] = epilogue(Σ_k x[m, x_column + k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r])
//   transposed: out[m, k] = epilogue(Σ_n x[m, x_column + n] · W[n, k] + Σ_r low[m, r] · factor[r, k])
//
// Bindings in matmul_bindings.wgsl: x [rows, x_stride], weights (words of W), out
// [rows, out_stride], low [rows, low_stride], factor (B [n, rank], transposed: A [rank, k]).
// A workgroup computes {{ tile_rows }} × {{ tile_columns }} outputs, a subgroup {{ subgroup_rows }} × {{ subgroup_columns }} of them in fragments of f32. The
// low-rank part comes first, then the weight, each in order of the contraction. Factors are rounded to
// f16, products exact, sums f32. The next tile is fetched into registers while the present one is
// multiplied. What comes out passes workgroup memory, a fragment of every subgroup at a time.
{% if emulated %}
//
// In plain WGSL: a lane holds every {{ subgroup_lanes }}th number of a fragment.
{% endif %}

{% include "parts/matmul_bindings.wgsl" %}

{% from "parts/stored.wgsl" import stored %}
{% set subgroups_x = tile_columns // subgroup_columns %}
{% set subgroups_y = tile_rows // subgroup_rows %}
{% set lanes = subgroups_x * subgroups_y * subgroup_lanes %}
{% set row_fragments = subgroup_rows // m %}
{% set column_fragments = subgroup_columns // n %}
{# Rows of a tile lie this many numbers apart: 16 bytes more, off each other's banks. #}
{% set x_step = depth + pad %}
{% set w_step = (tile_columns if transposed else depth) + pad %}
{% set x_units = depth * tile_rows // 4 // lanes %}
{% set w_units = depth * tile_columns // 8 // lanes %}
{% set low_steps = [depth, (rank + k - 1) // k * k] | min %}
{% set low_x_units = (low_steps * tile_rows // 4 + lanes - 1) // lanes %}
{% set low_w_units = (low_steps * tile_columns // 4 + lanes - 1) // lanes %}
{% set stage_rows = subgroups_y * m %}
{% set stage_columns = subgroups_x * n %}
{% set stage_quads = stage_rows * stage_columns // 4 %}
{% set whole = contraction % depth == 0 %}
const tile_rows = {{ tile_rows }}u;
const tile_columns = {{ tile_columns }}u;
const depth = {{ depth }}u;

// x_tile [tile_rows][{{ x_step }}]; w_tile [{{ "depth" if transposed else "tile_columns" }}][{{ w_step }}]; stage
// [{{ stage_rows }}][{{ stage_columns }}]: a fragment of every subgroup.
var<workgroup> x_tile: array<vec4<f16>, {{ tile_rows * x_step // 4 }}>;
var<workgroup> w_tile: array<vec4<f16>, {{ (depth if transposed else tile_columns) * w_step // 4 }}>;
var<workgroup> stage: array<vec4<f32>, {{ stage_quads }}>;

{# -- fragments, on matrix units: sum_I_J, one variable each. In plain WGSL `sums` has all of a lane's
   numbers, so that there is little to compile: the offsets are the same. #}
{% set held = m * n // subgroup_lanes %}
{% set left_type = "subgroup_matrix_left<f16, %d, %d>" % (k, m) %}
{% set right_type = "subgroup_matrix_right<f16, %d, %d>" % (n, k) %}
{% set right_order = "row_major" if transposed else "col_major" %}
{# Quads of the tiles between fragments: down x_tile, along w_tile, and to the next step of either. #}
{% set left_next = m * x_step // 4 %}
{% set right_next = n // 4 if transposed else n * w_step // 4 %}
{% set left_step = k // 4 %}
{% set right_step = k * w_step // 4 if transposed else k // 4 %}
{% if emulated %}

// A row of the left fragment at `left` times a column of the right one at `right`.
fn product(left: u32, right: u32, row: u32, column: u32) -> f32 {
    var sum = 0.0;
    for (var i = 0u; i < {{ k }}u; i++) {
        let a = x_tile[left + row * {{ x_step // 4 }}u + i / 4u][i % 4u];
{% if transposed %}
        let b = w_tile[right + i * {{ w_step // 4 }}u + column / 4u][column % 4u];
{% else %}
        let b = w_tile[right + column * {{ w_step // 4 }}u + i / 4u][i % 4u];
{% endif %}
        sum += f32(a) * f32(b);
    }
    return sum;
}
{% endif %}

{# What a lane fetches lies in the same place of several lines of a tile, so many lines apart: the
   compiler keeps one address for all. #}
{% set x_lines = lanes // (depth // 4) %}
{% set w_lines = lanes // (tile_columns // 8 if transposed else depth // 8) %}
{# Whether no tile reaches past the rows that there is memory for, past the columns of W. #}
{% set rows_fit = maximum_rows >= tile_rows %}
{% set columns_fit = n_columns >= tile_columns and (not transposed or n_columns % 8 == 0) %}

{# Fetches the tile from `from` on into the registers fetched_…. #}
{% macro fetch(from) %}
{% for i in range(x_units) %}
{% if rows_fit %}
{% set at = "x_from + %du + %s / 4u" % (i * x_lines * x_stride // 4, from) %}
{% else %}
{% set at = "(min(first_row + x_row + %du, last_row) * x_stride + x_column) / 4u + x_quad + %s / 4u" % (i * x_lines, from) %}
{% endif %}
{% if whole %}
        fetched_x_{{ i }} = {{ "vec4<f16>(x[" ~ at ~ "])" if x_type == "f32" else "x[" ~ at ~ "]" }};
{% else %}
        fetched_x_{{ i }} = vec4<f16>(x[min({{ at }}, last_x)]);
        if ({{ from }} + 4u * x_quad >= contraction) { fetched_x_{{ i }} = vec4<f16>(); }
{% endif %}
{% endfor %}
{% for i in range(w_units) %}
        {
            var eight = Eight();
{% if transposed %}
{% set row, column = "%s + w_line + %du" % (from, i * w_lines), "w_column" %}
{% set inside = row %}
{% else %}
{% set row = ("first_column + w_line + %du" if columns_fit else "min(first_column + w_line + %du, n_columns - 1u)") % (i * w_lines) %}
{% set column = "%s + 8u * w_eight" % from %}
{% set inside = column %}
{% endif %}
{% if not whole %}
            if ({{ inside }} < contraction) {
{% endif %}
            eight = decode8({{ row }}, {{ column }});
{% if not whole %}
            }
{% endif %}
            fetched_a_{{ i }} = vec4<f16>(eight.a);
            fetched_b_{{ i }} = vec4<f16>(eight.b);
        }
{% endfor %}
{% endmacro %}

{# Stores what was fetched into the tiles. #}
{% macro store_tiles() %}
{% for i in range(x_units) %}
        x_tile[x_to + {{ i * x_lines * x_step // 4 }}u] = fetched_x_{{ i }};
{% endfor %}
{% for i in range(w_units) %}
        w_tile[w_to + {{ i * w_lines * w_step // 4 }}u] = fetched_a_{{ i }};
        w_tile[w_to + {{ i * w_lines * w_step // 4 + 1 }}u] = fetched_b_{{ i }};
{% endfor %}
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
            let left_{{ i }} = subgroupMatrixLoad<{{ left_type }}, row_major>(&x_tile, left_from + {{ i * left_next + step * left_step }}u, {{ x_step // 4 }}u);
{% endfor %}
{% for j in range(column_fragments) %}
            let right_{{ j }} = subgroupMatrixLoad<{{ right_type }}, {{ right_order }}>(&w_tile, right_from + {{ j * right_next + step * right_step }}u, {{ w_step // 4 }}u);
{% for i in range(row_fragments) %}
            sum_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate(left_{{ i }}, right_{{ j }}, sum_{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
        }
{% endfor %}
{% endif %}
{% endmacro %}

// Writes out what is in the stage: of every subgroup the fragments from (row, column) on.
fn store_stage(lane: u32, first: vec2<u32>, own: vec2<u32>, fragment: vec2<u32>, stretch: u32) {
    for (var at = lane; at < {{ stage_quads }}u; at += {{ lanes }}u) {
        let line = at / {{ stage_columns // 4 }}u;
        let along = at % {{ stage_columns // 4 }}u * 4u;
        let row = first.y + line / {{ m }}u * {{ subgroup_rows }}u + fragment.y + line % {{ m }}u;
        let column = first.x + along / {{ n }}u * {{ subgroup_columns }}u + fragment.x + along % {{ n }}u;
        if (row >= own.y && row < extent.rows && column >= own.x && column < n_columns) {
            store({{ "row + stretch * " ~ maximum_rows ~ "u" if splits > 1 else "row" }}, column, stage[at]);
        }
    }
}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
{% if not emulated %}
    @builtin(subgroup_id) team: u32,
{% endif %}
) {
    let own_row = group.y * tile_rows;
    let own_column = group.x * tile_columns;
    // Uniform: the whole workgroup leaves before its first barrier.
    if (own_row >= extent.rows) { return; }
    // The last tiles begin so early that they end with the memory, and store only what is theirs.
    // Smaller products repeat their last row and column. Rows not in use are computed, and not stored.
    let first_row = {{ "min(own_row, %du)" % (maximum_rows - tile_rows) if rows_fit else "own_row" }};
    let first_column = {{ "min(own_column, %du)" % (n_columns - tile_columns) if columns_fit else "own_column" }};
    let last_row = extent.rows - 1u;
    let x_column = {{ "place.x_column" if placed else "0u" }};
{% if not whole %}
    let last_x = (last_row * x_stride + x_column + contraction) / 4u - 1u;
{% endif %}
{% if emulated %}
    let team = lane / {{ subgroup_lanes }}u;
    let team_lane = lane % {{ subgroup_lanes }}u;
{% endif %}
    let team_y = team / {{ subgroups_x }}u;
    let team_x = team % {{ subgroups_x }}u;
    let left_from = team_y * {{ subgroup_rows * x_step // 4 }}u;
    let right_from = team_x * {{ (subgroup_columns if transposed else subgroup_columns * w_step) // 4 }}u;
{% if emulated %}
    var sums = array<f32, {{ row_fragments * column_fragments * held }}>();
{% else %}
{% for i in range(row_fragments) %}
{% for j in range(column_fragments) %}
    var sum_{{ i }}_{{ j }} = subgroup_matrix_result<f32, {{ n }}, {{ m }}>();
{% endfor %}
{% endfor %}
{% endif %}
    let x_quad = lane % {{ depth // 4 }}u;
    let x_row = lane / {{ depth // 4 }}u;
    let x_to = x_row * {{ x_step // 4 }}u + x_quad;
{% if rows_fit %}
    let x_from = ((first_row + x_row) * x_stride + x_column) / 4u + x_quad;
{% endif %}
{% for i in range(x_units) %}
    var fetched_x_{{ i }} = vec4<f16>();
{% endfor %}
    let w_eight = lane % {{ tile_columns // 8 if transposed else depth // 8 }}u;
    let w_line = lane / {{ tile_columns // 8 if transposed else depth // 8 }}u;
    let w_to = w_line * {{ w_step // 4 }}u + 2u * w_eight;
{% if transposed %}
    let w_column = {{ "first_column + 8u * w_eight" if columns_fit else "min(first_column + 8u * w_eight, %du)" % ((n_columns - 1) // 8 * 8) }};
{% endif %}
{% for i in range(w_units) %}
    var fetched_a_{{ i }} = vec4<f16>();
    var fetched_b_{{ i }} = vec4<f16>();
{% endfor %}

{% if splits > 1 %}
    // Workgroups with z = s sum the stretch s of the contraction; the low-rank part goes with the first.
    let first_k = group.z * {{ split_length }}u;
    let last_k = min(first_k + {{ split_length }}u, contraction);
{% else %}
    let first_k = 0u;
    let last_k = contraction;
{% endif %}
{{ fetch("first_k") }}
{% if splits > 1 %}
    if (group.z == 0u) {
{% endif %}
{% for member in members %}
{% if not transposed %}
    if (first_column < {{ member.stop }}u && first_column + tile_columns > {{ member.start }}u) {
{% endif %}
    for (var r = 0u; r < {{ rank }}u; r += {{ low_steps }}u) {
        // All loads first: each would otherwise wait for the one before.
{% for i in range(low_x_units) %}
        let low_unit_{{ i }} = lane + {{ i * lanes }}u;
        let low_quad_{{ i }} = low_unit_{{ i }} % {{ low_steps // 4 }}u;
        let low_row_{{ i }} = low_unit_{{ i }} / {{ low_steps // 4 }}u;
        var low_{{ i }} = vec4<f32>();
        if (r + 4u * low_quad_{{ i }} < {{ rank }}u) {
            low_{{ i }} = low[(min(first_row + low_row_{{ i }}, last_row) * {{ low_stride }}u + {{ member.low_start }}u + r) / 4u + low_quad_{{ i }}];
        }
{% endfor %}
{% for i in range(low_w_units) %}
        let factor_unit_{{ i }} = lane + {{ i * lanes }}u;
        var factor_{{ i }} = vec4<f32>();
{% if transposed %}
        let factor_quad_{{ i }} = factor_unit_{{ i }} % {{ tile_columns // 4 }}u;
        let factor_step_{{ i }} = factor_unit_{{ i }} / {{ tile_columns // 4 }}u;
        let factor_to_{{ i }} = factor_step_{{ i }} * {{ w_step // 4 }}u + factor_quad_{{ i }};
        let factor_column_{{ i }} = first_column + 4u * factor_quad_{{ i }};
        if (r + factor_step_{{ i }} < {{ rank }}u && factor_column_{{ i }} < n_columns) {
            factor_{{ i }} = factor[(({{ member.low_start }}u + r + factor_step_{{ i }}) * n_columns + factor_column_{{ i }}) / 4u];
        }
{% else %}
        let factor_quad_{{ i }} = factor_unit_{{ i }} % {{ low_steps // 4 }}u;
        let factor_line_{{ i }} = factor_unit_{{ i }} / {{ low_steps // 4 }}u;
        let factor_to_{{ i }} = factor_line_{{ i }} * {{ w_step // 4 }}u + factor_quad_{{ i }};
        let factor_column_{{ i }} = first_column + factor_line_{{ i }};
        if (factor_column_{{ i }} >= {{ member.start }}u && factor_column_{{ i }} < {{ member.stop }}u && r + 4u * factor_quad_{{ i }} < {{ rank }}u) {
            factor_{{ i }} = {{ scale }} * factor[((factor_column_{{ i }} - {{ member.start }}u + {{ member.factor_start }}u) * {{ rank }}u + r) / 4u + factor_quad_{{ i }}];
        }
{% endif %}
{% endfor %}
        workgroupBarrier();
{% for i in range(low_x_units) %}
{% if (i + 1) * lanes > low_steps * tile_rows // 4 %}
        if (low_unit_{{ i }} < {{ low_steps * tile_rows // 4 }}u) {
            x_tile[low_row_{{ i }} * {{ x_step // 4 }}u + low_quad_{{ i }}] = vec4<f16>(low_{{ i }});
        }
{% else %}
        x_tile[low_row_{{ i }} * {{ x_step // 4 }}u + low_quad_{{ i }}] = vec4<f16>(low_{{ i }});
{% endif %}
{% endfor %}
{% for i in range(low_w_units) %}
{% if (i + 1) * lanes > low_steps * tile_columns // 4 %}
        if (factor_unit_{{ i }} < {{ low_steps * tile_columns // 4 }}u) {
            w_tile[factor_to_{{ i }}] = vec4<f16>(factor_{{ i }});
        }
{% else %}
        w_tile[factor_to_{{ i }}] = vec4<f16>(factor_{{ i }});
{% endif %}
{% endfor %}
        workgroupBarrier();
{{ multiply_tiles(low_steps) }}
    }
{% if not transposed %}
    }
{% endif %}
{% endfor %}
{% if splits > 1 %}
    }
{% endif %}

    for (var at_k = first_k; at_k < last_k; at_k += depth) {
        workgroupBarrier();
{{ store_tiles() }}
        workgroupBarrier();
        let ahead = select(at_k, at_k + depth, at_k + depth < last_k);
{{ fetch("ahead") }}
{{ multiply_tiles(depth) }}
    }

    let first = vec2(first_column, first_row);
    let own = vec2(own_column, own_row);
    let stage_from = team_y * {{ m * stage_columns // 4 }}u + team_x * {{ n // 4 }}u;
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
}
