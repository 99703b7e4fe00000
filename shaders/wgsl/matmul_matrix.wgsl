// The quantized matmul on matrix units: tiles of both sides in workgroup memory as f16, W decoded on
// the way in, multiplied in fragments of {{ m }} × {{ k }} and {{ k }} × {{ n }} by the lanes of a subgroup together.
//
//   out[m, n] = epilogue(Σ_k x[m, x_column + k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r])
//   transposed: out[m, k] = epilogue(Σ_n x[m, x_column + n] · W[n, k] + Σ_r low[m, r] · factor[r, k])
{% if dropout and members %}
//   where of the low-rank part each member's share, times {{ dropout.scale }}, counts where its mask keeps (parts/dropout.wgsl)
{% endif %}
//
// Bindings in matmul_bindings.wgsl: x [rows, x_stride], weights (words of W), out
// [rows, out_stride], low [rows, low_stride], factor (B [n, rank], transposed: A [rank, k]).
// A workgroup computes {{ tile_rows }} × {{ tile_columns }} outputs, a subgroup {{ subgroup_rows }} × {{ subgroup_columns }} of them in fragments of f32.
{% if paired %}
// The weight comes first, then the low-rank part, each in order of the contraction. Factors are f32, as
// pairs of f16 (parts/matmul_matrix_pairs.wgsl), their products exact, sums f32: every {{ carry }} steps they are
// added to others, counted from the first. The low-rank part is plain f32. x_largest [rows], w_largest [rows
// of W, then its columns]: bits of the largest numbers.
{% if prepared %}
// x{{ "" if w_exact else " and W" }} were paired beforehand (pair_rows.wgsl{{ "" if w_exact else ", pair_weights.wgsl" }}): all upper halves, then all lower ones, of whole steps.
{% endif %}
{% else %}
// The low-rank part comes first, then the weight, each in order of the contraction. Factors are rounded to
// f16, products exact, sums f32.
{% endif %}
// The next tile is fetched into registers while the present one is multiplied. What comes out passes
// workgroup memory, a fragment of every subgroup at a time.
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
{% set x_units = depth * tile_rows // 8 // lanes %}
{% set w_units = depth * tile_columns // 8 // lanes %}
{% set low_steps = [depth, (rank + k - 1) // k * k] | min %}
{% set low_x_units = (low_steps * tile_rows // 8 + lanes - 1) // lanes %}
{% set low_w_units = (low_steps * tile_columns // 8 + lanes - 1) // lanes %}
{% set stage_rows = subgroups_y * m %}
{% set stage_columns = subgroups_x * n %}
{% set stage_quads = stage_rows * stage_columns // 4 %}
{# What was paired beforehand ends with whole steps, zeros beyond the contraction. #}
{% set x_whole = contraction % depth == 0 or prepared %}
{% set w_whole = contraction % depth == 0 or (prepared and not w_exact) %}
{# The tiles of upper halves are followed by those of lower ones. #}
{% set x_lower = tile_rows * x_step // 8 %}
{% set w_lower = (depth if transposed else tile_columns) * w_step // 8 %}
const tile_rows = {{ tile_rows }}u;
const tile_columns = {{ tile_columns }}u;
const depth = {{ depth }}u;

// x_tile [tile_rows][{{ x_step }}] and w_tile [{{ "depth" if transposed else "tile_columns" }}][{{ w_step }}], eight f16 an element; stage
// [{{ stage_rows }}][{{ stage_columns }}]: a fragment of every subgroup.
{% if paired %}
// Of both tiles there are two, upper halves and lower ones.
{% endif %}
var<workgroup> x_tile: array<vec4<u32>, {{ x_lower * (2 if paired else 1) }}>;
var<workgroup> w_tile: array<vec4<u32>, {{ w_lower * (2 if paired and (members or not w_exact) else 1) }}>;
var<workgroup> stage: array<vec4<f32>, {{ stage_quads }}>;

{# Whether no tile reaches past the rows that there is memory for, past the columns of W. #}
{% set rows_fit = maximum_rows >= tile_rows %}
{% set columns_fit = n_columns >= tile_columns and (not transposed or n_columns % 8 == 0) %}
{% import "parts/matmul_matrix_sums.wgsl" as parts with context %}
{% import "parts/matmul_matrix_pairs.wgsl" as pairs with context %}
{% from "parts/pairs.wgsl" import packing %}
{{ packing() }}
{{ parts.product_of_fragments() }}
{% if paired %}
{{ pairs.declare() }}
{% endif %}

{# What a lane fetches lies in the same place of several lines of a tile, so many lines apart: the
   compiler keeps one address for all. #}
{% set x_lines = lanes // (depth // 8) %}
{% set w_lines = lanes // (tile_columns // 8 if transposed else depth // 8) %}
{# Lines of 80 bytes: eight lanes that store at once hold two of them, which must lie four apart to be
   off each other's banks (251 → 281 TFLOP/s of 4096³ on an H200). #}
{% macro line_of(eights) %}
{% if eights == 4 and lanes % 32 == 0 %}
((lane / 4u) & ~7u) | (((lane / 4u) & 1u) << 2u) | ((lane / 8u) & 3u)
{%- else %}
lane / {{ eights }}u
{%- endif %}
{% endmacro %}
{# What is fetched: eight numbers as the tiles hold them, or as they are. #}
{% set scales_x = x_scaled and x_type == "f32" %}
{% set x_held = "Pair" if prepared else "Eight" if paired or scales_x else "vec4<u32>" %}
{% set w_pairs = paired and not w_exact %}
{% set w_held = "vec4<u32>" if not w_pairs else "Pair" if prepared else "Eight" %}

{% if x_whole %}
// Eight numbers of x from the quad `at` on.
fn eight_of_x(at: u32) -> {{ x_held }} {
{% if prepared %}
    return Pair(x[at / 2u], x[at / 2u + {{ maximum_rows * x_stride // 8 }}u]);
{% elif paired or scales_x %}
    return Eight(vec4<f32>(x[at]), vec4<f32>(x[at + 1u]));
{% elif x_by_eights %}
    return x[at / 2u];
{% else %}
    return vec4(packed(vec4<f32>(x[at])), packed(vec4<f32>(x[at + 1u])));
{% endif %}
}
{% else %}
// Eight numbers of x from the quad `at` on, column `column` of the contraction; beyond it zeros.
fn eight_of_x(at: u32, column: u32, last: u32) -> {{ x_held }} {
{% if paired or scales_x %}
    let a = vec4<f32>(x[min(at, last)]);
    let b = vec4<f32>(x[min(at + 1u, last)]);
    return Eight(select(vec4<f32>(), a, column < contraction), select(vec4<f32>(), b, column + 4u < contraction));
{% else %}
    let a = packed(vec4<f32>(x[min(at, last)]));
    let b = packed(vec4<f32>(x[min(at + 1u, last)]));
    return vec4(select(vec2(0u), a, column < contraction), select(vec2(0u), b, column + 4u < contraction));
{% endif %}
}
{% endif %}

// Eight weights of a row from column k on; {{ "rows" if transposed else "columns" }} beyond the contraction are zeros.
fn eight_of_w(row: u32, k: u32) -> {{ w_held }} {
{% if not w_whole %}
    if ({{ "row" if transposed else "k" }} >= contraction) { return {{ w_held }}(); }
{% endif %}
{% if w_pairs and prepared %}
    let at = (row * row_words + k / 2u) / 4u;
    return Pair(weights[at], weights[at + {{ w_paired_rows * row_words // 4 }}u]);
{% elif w_by_eights %}
    return weights[(row * row_words + k / 2u) / 4u];
{% else %}
{% if w_pairs and not transposed and contraction % 8 %}
    var eight = decode8(row, k);
    if (k + 4u >= contraction) { eight.b = vec4<f32>(); } // another row's, by this row's scale
    return eight;
{% elif w_pairs %}
    return decode8(row, k);
{% else %}
    let eight = {{ "powered8" if powered and w_powered else "decode8" }}(row, k);
    return vec4(packed(eight.a), packed(eight.b));
{% endif %}
{% endif %}
}

{# Fetches the tile from `from` on into the registers fetched_…. Of x in blocks a column lies as much further on as
   there are columns in the blocks before it. #}
{% macro fetch(from) %}
{% set x_from = "%s + (%s & ~%du)" % (from, from, x_block - 1) if x_block else from %}
{% for i in range(x_units) %}
{% if rows_fit %}
{% set at = "x_from + %du + (%s) / 4u" % (i * x_lines * x_stride // 4, x_from) %}
{% else %}
{% set at = "(min(first_row + x_row + %du, last_row) * x_stride + x_column) / 4u + 2u * x_eight + (%s) / 4u" % (i * x_lines, x_from) %}
{% endif %}
{% if x_whole %}
        fetched_x_{{ i }} = eight_of_x({{ at }});
{% else %}
        fetched_x_{{ i }} = eight_of_x({{ at }}, {{ from }} + 8u * x_eight, last_x);
{% endif %}
{% endfor %}
{% for i in range(w_units) %}
        fetched_w_{{ i }} = {{ "eight_of_w(%s, %s)" % (
            from ~ " + w_line + %du" % (i * w_lines) if transposed
            else ("first_column + w_line + %du" if columns_fit else "min(first_column + w_line + %du, n_columns - 1u)") % (i * w_lines),
            "w_column" if transposed else from ~ " + 8u * w_eight",
        ) }};
{% endfor %}
{% endmacro %}

{# What was fetched, as pairs, which need not wait for the tiles to be free. #}
{% macro make_pairs() %}
{% for i in range(x_units) %}
        let x_pair_{{ i }} = pair(fetched_x_{{ i }}.a * x_power_{{ i }}, fetched_x_{{ i }}.b * x_power_{{ i }});
{% endfor %}
{% for i in range(w_units if w_pairs else 0) %}
{% set of = "" if transposed else i %}
        let w_pair_{{ i }} = pair(fetched_w_{{ i }}.a * w_power_a{{ of }}, fetched_w_{{ i }}.b * w_power_b{{ of }});
{% endfor %}
{% endmacro %}

{# Stores what was fetched into the tiles. #}
{% macro store_tiles() %}
{% for i in range(x_units) %}
{% set to = "x_to + %du" % (i * x_lines * x_step // 8) %}
{% if paired %}
{% set made = "%s_%d" % ("fetched_x" if prepared else "x_pair", i) %}
        x_tile[{{ to }}] = {{ made }}.upper;
        x_tile[{{ to }} + {{ x_lower }}u] = {{ made }}.lower;
{% elif scales_x %}
        x_tile[{{ to }}] = vec4(packed(fetched_x_{{ i }}.a * x_power_{{ i }}), packed(fetched_x_{{ i }}.b * x_power_{{ i }}));
{% else %}
        x_tile[{{ to }}] = fetched_x_{{ i }};
{% endif %}
{% endfor %}
{% for i in range(w_units) %}
{% set to = "w_to + %du" % (i * w_lines * w_step // 8) %}
{% if w_pairs %}
{% set made = "%s_%d" % ("fetched_w" if prepared else "w_pair", i) %}
        w_tile[{{ to }}] = {{ made }}.upper;
        w_tile[{{ to }} + {{ w_lower }}u] = {{ made }}.lower;
{% else %}
        w_tile[{{ to }}] = fetched_w_{{ i }};
{% endif %}
{% endfor %}
{% endmacro %}

{% if dropout and members %}
// The key of the row of four numbers of the stage, of the fragments from `first` on.
fn row_key_of(at: u32, first: u32) -> u32 {
    let line = at / {{ stage_columns // 4 }}u;
    return row_keys[min(first + line / {{ m }}u * {{ subgroup_rows }}u + line % {{ m }}u, extent.rows - 1u)];
}

// Which of them a member's mask keeps; their fragments begin at column `first`.
fn kept_in_stage(at: u32, row_key: u32, member: u32, first: u32) -> vec4<bool> {
    let along = at % {{ stage_columns // 4 }}u * 4u;
    let column = first + along / {{ n }}u * {{ subgroup_columns }}u + along % {{ n }}u;
    return kept(row_key, quad_key(matrix_keys[member], column / 4u));
}

{% endif %}
// Writes out what is in the stage: of every subgroup the fragments from (row, column) on.
fn store_stage(lane: u32, first: vec2<u32>, own: vec2<u32>, fragment: vec2<u32>, stretch: u32) {
    for (var at = lane; at < {{ stage_quads }}u; at += {{ lanes }}u) {
        let line = at / {{ stage_columns // 4 }}u;
        let along = at % {{ stage_columns // 4 }}u * 4u;
        let row = first.y + line / {{ m }}u * {{ subgroup_rows }}u + fragment.y + line % {{ m }}u;
        let column = first.x + along / {{ n }}u * {{ subgroup_columns }}u + fragment.x + along % {{ n }}u;
        if (row >= own.y && row < extent.rows && column >= own.x && column < n_columns) {
            store({{ "row + stretch * " ~ maximum_rows ~ "u" if splits > 1 else "row" }}, column, stage[at]{{ " * out_power(row)" if x_scaled or powered }});
        }
    }
}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
{% if not emulated %}
    @builtin(subgroup_id) team: u32,
{% if paired %}
    @builtin(subgroup_invocation_id) team_lane: u32,
{% endif %}
{% endif %}
) {
{% set tiles_down, tiles_across = (maximum_rows + tile_rows - 1) // tile_rows, (n_columns + tile_columns - 1) // tile_columns %}
{% set band = [tiles_down, 16] | min %}
{% if band == 1 %}
    let own_row = group.y * tile_rows;
    let own_column = group.x * tile_columns;
{% else %}
    // Down bands of {{ band }} tiles, and then across: those that run together read few tiles of either side from memory.
    let index = group.y * {{ tiles_across }}u + group.x;
    let above = index / {{ band * tiles_across }}u * {{ band }}u;
    let height = min({{ band }}u, {{ tiles_down }}u - above);
    let own_row = (above + index % {{ band * tiles_across }}u % height) * tile_rows;
    let own_column = index % {{ band * tiles_across }}u / height * tile_columns;
{% endif %}
    // Uniform: the whole workgroup leaves before its first barrier.
    if (own_row >= extent.rows) { return; }
    // The last tiles begin so early that they end with the memory, and store only what is theirs.
    // Smaller products repeat their last row and column. Rows not in use are computed, and not stored.
    let first_row = {{ "min(own_row, %du)" % (maximum_rows - tile_rows) if rows_fit else "own_row" }};
    let first_column = {{ "min(own_column, %du)" % (n_columns - tile_columns) if columns_fit else "own_column" }};
    let last_row = extent.rows - 1u;
    let x_column = {{ "place.x_column" if placed and not prepared else "0u" }};
{% if not x_whole %}
    let last_x = (last_row * x_stride + x_column + contraction) / 4u - 1u;
{% endif %}
{% if emulated %}
    let team = lane / {{ subgroup_lanes }}u;
    let team_lane = lane % {{ subgroup_lanes }}u;
{% endif %}
    let team_y = team / {{ subgroups_x }}u;
    let team_x = team % {{ subgroups_x }}u;
{% if paired %}
    let left_row = team_y * {{ subgroup_rows }}u;
    let right_column = team_x * {{ subgroup_columns }}u;
{% endif %}
    let stage_from = team_y * {{ m * stage_columns // 4 }}u + team_x * {{ n // 4 }}u;
    let left_from = team_y * {{ subgroup_rows * x_step // 8 }}u;
    let right_from = team_x * {{ (subgroup_columns if transposed else subgroup_columns * w_step) // 8 }}u;
{{ parts.declare_sums() }}
    let x_eight = lane % {{ depth // 8 }}u;
    let x_row = {{ line_of(depth // 8) }};
    let x_to = x_row * {{ x_step // 8 }}u + x_eight;
{% if rows_fit %}
    let x_from = ((first_row + x_row) * x_stride + x_column) / 4u + 2u * x_eight;
{% endif %}
{% for i in range(x_units) %}
    var fetched_x_{{ i }} = {{ x_held }}();
{% set row = "first_row + x_row + %du" % (i * x_lines) %}
{% if paired and not prepared %}
    let x_power_{{ i }} = power(row_exponent({{ row }}));
{% elif scales_x %}
    let x_power_{{ i }} = x_power({{ row }});
{% endif %}
{% endfor %}
{% set w_eights = tile_columns // 8 if transposed else depth // 8 %}
    let w_eight = lane % {{ w_eights }}u;
    let w_line = {{ "lane / %du" % w_eights if transposed else line_of(w_eights) }};
    let w_to = w_line * {{ w_step // 8 }}u + w_eight;
{% if transposed %}
    let w_column = {{ "first_column + 8u * w_eight" if columns_fit else "min(first_column + 8u * w_eight, %du)" % ((n_columns - 1) // 8 * 8) }};
{% endif %}
{% for i in range(w_units) %}
    var fetched_w_{{ i }} = {{ w_held }}();
{% if w_pairs and not prepared and not transposed %}
    let w_power_a{{ i }} = power(column_exponent(first_column + w_line + {{ i * w_lines }}u));
    let w_power_b{{ i }} = w_power_a{{ i }};
{% endif %}
{% endfor %}
{% if w_pairs and not prepared and transposed %}
{% for half in "ab" %}
    let w_power_{{ half }} = vec4(
{% for c in range(4) %}
        power(column_exponent(w_column + {{ c + (0 if half == "a" else 4) }}u)){{ "," if c < 3 }}
{% endfor %}
    );
{% endfor %}
{% endif %}

{% if splits > 1 %}
    // Workgroups with z = s sum the stretch s of the contraction; the low-rank part goes with the first.
    let first_k = group.z * {{ split_length }}u;
    let last_k = min(first_k + {{ split_length }}u, contraction);
{% else %}
    let first_k = 0u;
    let last_k = contraction;
{% endif %}
{{ fetch("first_k") }}
{% if not paired %}
{% include "parts/matmul_matrix_low.wgsl" %}
{% endif %}

    for (var at_k = first_k; at_k < last_k; at_k += depth) {
{% if paired and not prepared %}
{{ make_pairs() }}
{% endif %}
        workgroupBarrier();
{{ store_tiles() }}
        workgroupBarrier();
        let ahead = select(at_k, at_k + depth, at_k + depth < last_k);
{{ fetch("ahead") }}
{{ parts.multiply_tiles(depth, w_exact) }}
{% if paired and (split_length if splits > 1 else contraction) > carry %}
        if ((at_k - first_k) % {{ carry }}u == {{ carry - depth }}u) {
{{ pairs.carry_sums() }}
        }
{% endif %}
    }
{% if paired %}
{{ pairs.finish_sums() }}
{% include "parts/matmul_matrix_low.wgsl" %}
{% endif %}

    let first = vec2(first_column, first_row);
    let own = vec2(own_column, own_row);
{{ parts.write_sums() }}
}
