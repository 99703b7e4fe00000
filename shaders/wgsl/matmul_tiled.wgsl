// The quantized matmul for GPUs: tiles of both sides in workgroup memory, W decoded on the way in.
//
//   out[m, n] = epilogue(Σ_k x[m, x_column + k] · W[n, k] + scale · Σ_r low[m, r] · factor[n, r])
//   transposed: out[m, k] = epilogue(Σ_n x[m, x_column + n] · W[n, k] + Σ_r low[m, r] · factor[r, k])
//
// Bindings in matmul_bindings.wgsl: x [rows, x_stride], weights (words of W), out
// [rows, out_stride], low [rows, low_stride], factor (B [n, rank], transposed: A [rank, k]).
// A workgroup computes {{ tile_rows }} × {{ tile_columns }} outputs, a lane {{ lane_rows }} × {{ lane_columns }} of them in named
// accumulators. The low-rank part comes first, then the weight, each in order of the contraction:
// an output depends on its row of x and its column of W only, not on where its tile lies.
//
// The next tile is fetched into registers while the present one is multiplied, without a branch, so that
// the compiler can decode between products{% if buffers == 2 %}, and stored beside it: one barrier a tile{% endif %}. Neighbouring lanes fetch along
// the contraction, where memory is contiguous, and store across it (x in blocks of 4 × 4 where a lane
// has so many): an exclusive-or of the place with the step keeps such stores off each other's banks.
{% if half %}
//
// The tiles hold f16, products and the sums of {{ carry }} steps are f16, those of all steps f32.
{% endif %}

{% include "parts/matmul_bindings.wgsl" %}
{% set decode = "powered8" if powered else "decode8" %}

{% from "parts/stored.wgsl" import stored %}
{% set tile_type = "f16" if half else "f32" %}
const tile_rows = {{ tile_rows }}u;
const tile_columns = {{ tile_columns }}u;
const depth = {{ depth }}u;
{% set lanes_x = tile_columns // lane_columns %}
{% set lanes_y = tile_rows // lane_rows %}
{% set lanes = lanes_x * lanes_y %}
{% set row_quads = lane_rows // 4 %}
{% set column_quads = lane_columns // 4 %}
{% set x_quads = depth * tile_rows // 4 %}
{% set w_quads = depth * tile_columns // 4 %}
{% set x_units = x_quads // lanes %}
{% set x_blocks = x_units // 4 if x_units % 4 == 0 else 0 %}
{% set w_units = w_quads // 2 // lanes %}
{% set low_steps = [depth, rank] | min %}
{% set low_x_units = (low_steps * tile_rows // 4 + lanes - 1) // lanes %}
{% set low_w_units = (low_steps * tile_columns // 4 + lanes - 1) // lanes %}
{% set whole = contraction % depth == 0 %}

// [{{ "buffer][" if buffers == 2 }}depth][tile / 4], a vec4 holding four neighbouring rows (columns).
var<workgroup> x_tile: array<vec4<{{ tile_type }}>, {{ buffers * x_quads }}>;
var<workgroup> w_tile: array<vec4<{{ tile_type }}>, {{ buffers * w_quads }}>;

// Where the four rows (columns) `quad` of a step lie.
fn x_at(step: u32, quad: u32) -> u32 { return step * {{ tile_rows // 4 }}u + (quad ^ ((step / 4u) & 7u)); }
fn w_at(step: u32, quad: u32) -> u32 {
{% if transposed %}
    return step * {{ tile_columns // 4 }}u + quad; // stored whole, along the columns
{% else %}
    return step * {{ tile_columns // 4 }}u + (quad ^ (2u * ((step / 8u) & 3u)));
{% endif %}
}

fn store_x(at: u32, m: u32, step: u32, value: vec4<{{ tile_type }}>) {
{% for c in range(4) %}
    x_tile[at + x_at(step + {{ c }}u, m / 4u)][m % 4u] = value[{{ c }}];
{% endfor %}
}

fn store_w(at: u32, n: u32, step: u32, w: Eight) {
    let a = vec4<{{ tile_type }}>(w.a);
    let b = vec4<{{ tile_type }}>(w.b);
{% for c in range(8) %}
    w_tile[at + w_at(step + {{ c }}u, n / 4u)][n % 4u] = {{ "a" if c < 4 else "b" }}[{{ c % 4 }}];
{% endfor %}
}

{# Fetches the tile from `k` on into the registers x_… and w_…. #}
{% macro fetch(k) %}
{% for i in range(x_units) %}
{% if whole %}
        fetched_x_{{ i }} = x[x_from_{{ i }} + {{ k }} / 4u];
{% else %}
        fetched_x_{{ i }} = x[min(x_from_{{ i }} + {{ k }} / 4u, last_x)];
        if ({{ k }} + 4u * x_quad_{{ i }} >= contraction) { fetched_x_{{ i }} = vec4<{{ x_type }}>(); }
{% endif %}
{% endfor %}
{% for i in range(w_units) %}
{% if transposed %}
{% if whole %}
        fetched_w_{{ i }} = {{ decode }}({{ k }} + w_row_{{ i }}, w_column_{{ i }});
{% else %}
        fetched_w_{{ i }} = Eight();
        if ({{ k }} + w_row_{{ i }} < contraction) {
            fetched_w_{{ i }} = {{ decode }}({{ k }} + w_row_{{ i }}, w_column_{{ i }});
        }
{% endif %}
{% else %}
{% if whole %}
        fetched_w_{{ i }} = {{ decode }}(w_row_{{ i }}, {{ k }} + 8u * w_eight_{{ i }});
{% else %}
        fetched_w_{{ i }} = Eight();
        if ({{ k }} + 8u * w_eight_{{ i }} < contraction) {
            fetched_w_{{ i }} = {{ decode }}(w_row_{{ i }}, {{ k }} + 8u * w_eight_{{ i }});
        }
{% endif %}
{% endif %}
{% endfor %}
{% endmacro %}

{# What the steps of a stretch are summed in: with f16, parts of their own, added to the sums after it. #}
{% set part = "part" if half else "sum" %}
{% macro begin_parts() %}
{% if half %}
{% for i in range(lane_rows) %}
{% for j in range(column_quads) %}
        var part_{{ i }}_{{ j }} = vec4<f16>();
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}
{% macro end_parts() %}
{% if half %}
{% for i in range(lane_rows) %}
{% for j in range(column_quads) %}
        sum_{{ i }}_{{ j }} += vec4<f32>(part_{{ i }}_{{ j }});
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Where the tiles of the buffer in use begin. #}
{% set x_buffer = "buffer * %du + " % x_quads if buffers == 2 else "" %}
{% set w_buffer = "buffer * %du + " % w_quads if buffers == 2 else "" %}
{# Four numbers of x as fetched, as the tile holds them. #}
{% macro as_tile(i) -%}
{% set fetched = "fetched_x_%d%s" % (i, " * x_power_%d" % i if x_scaled else "") %}
{{ stored(fetched, tile_type) if x_type == "f32" else fetched if half else "vec4<f32>(" ~ fetched ~ ")" }}
{%- endmacro %}
{# Stores what was fetched into the tiles. #}
{% macro store_tiles() %}
{% for i in range(x_blocks) %}
        {
{% for u in range(4) %}
            let line_{{ u }} = {{ as_tile(4 * i + u) }};
{% endfor %}
{% for c in range(4) %}
            x_tile[{{ x_buffer }}x_at(4u * x_quad_{{ 4 * i }} + {{ c }}u, x_row_{{ 4 * i }} / 4u)] = vec4<{{ tile_type }}>(line_0[{{ c }}], line_1[{{ c }}], line_2[{{ c }}], line_3[{{ c }}]);
{% endfor %}
        }
{% endfor %}
{% for i in range(0 if x_blocks else x_units) %}
        store_x({{ x_buffer }}0u, x_row_{{ i }}, 4u * x_quad_{{ i }}, {{ as_tile(i) }});
{% endfor %}
{% for i in range(w_units) %}
{% if transposed %}
        w_tile[{{ w_buffer }}w_at(w_row_{{ i }}, 2u * w_eight_{{ i }})] = vec4<{{ tile_type }}>(fetched_w_{{ i }}.a);
        w_tile[{{ w_buffer }}w_at(w_row_{{ i }}, 2u * w_eight_{{ i }} + 1u)] = vec4<{{ tile_type }}>(fetched_w_{{ i }}.b);
{% else %}
        store_w({{ w_buffer }}0u, w_line_{{ i }}, 8u * w_eight_{{ i }}, fetched_w_{{ i }});
{% endif %}
{% endfor %}
{% endmacro %}

{# Multiplies one step of the two tiles into the accumulators. #}
{% macro multiply_step(step) %}
        {
{% for i in range(row_quads) %}
            let a_{{ i }} = x_tile[{{ x_buffer }}x_at({{ step }}, {{ i * lanes_y }}u + lane_y)];
{% endfor %}
{% for j in range(column_quads) %}
            let b_{{ j }} = w_tile[{{ w_buffer }}w_at({{ step }}, {{ j * lanes_x }}u + lane_x)];
{% endfor %}
{% for i in range(lane_rows) %}
{% for j in range(column_quads) %}
            {{ part }}_{{ i }}_{{ j }} += a_{{ i // 4 }}[{{ i % 4 }}] * b_{{ j }};
{% endfor %}
{% endfor %}
        }
{% endmacro %}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first_row = group.y * tile_rows;
    let first_column = group.x * tile_columns;
    // Uniform: the whole workgroup leaves before its first barrier.
    if (first_row >= extent.rows) { return; }
    // Rows and columns past the end repeat the last: what they give is not stored.
    let last_row = extent.rows - 1u;
    let x_column = {{ "place.x_column" if placed else "0u" }};
{% if not whole %}
    let last_x = (last_row * x_stride + x_column + contraction) / 4u - 1u;
{% endif %}
    let lane_x = lane % {{ lanes_x }}u;
    let lane_y = lane / {{ lanes_x }}u;
{% for i in range(lane_rows) %}
{% for j in range(column_quads) %}
    var sum_{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}
{% for i in range(x_units) %}
{% if x_blocks %}
    let x_quad_{{ i }} = (lane + {{ i // 4 * lanes }}u) % {{ depth // 4 }}u;
    let x_row_{{ i }} = (lane + {{ i // 4 * lanes }}u) / {{ depth // 4 }}u * 4u + {{ i % 4 }}u;
{% else %}
    let x_quad_{{ i }} = (lane + {{ i * lanes }}u) % {{ depth // 4 }}u;
    let x_row_{{ i }} = (lane + {{ i * lanes }}u) / {{ depth // 4 }}u;
{% endif %}
    let x_from_{{ i }} = (min(first_row + x_row_{{ i }}, last_row) * x_stride + x_column) / 4u + x_quad_{{ i }};
    var fetched_x_{{ i }} = vec4<{{ x_type }}>();
{% if x_scaled %}
    let x_power_{{ i }} = x_power(first_row + x_row_{{ i }});
{% endif %}
{% endfor %}
{% for i in range(w_units) %}
{% if transposed %}
    let w_row_{{ i }} = (lane + {{ i * lanes }}u) / {{ tile_columns // 8 }}u;
    let w_eight_{{ i }} = (lane + {{ i * lanes }}u) % {{ tile_columns // 8 }}u;
    let w_column_{{ i }} = min(first_column + 8u * w_eight_{{ i }}, {{ (n_columns - 1) // 8 * 8 }}u);
{% else %}
    let w_eight_{{ i }} = (lane + {{ i * lanes }}u) % {{ depth // 8 }}u;
    let w_line_{{ i }} = (lane + {{ i * lanes }}u) / {{ depth // 8 }}u;
    let w_row_{{ i }} = min(first_column + w_line_{{ i }}, n_columns - 1u);
{% endif %}
    var fetched_w_{{ i }} = Eight();
{% endfor %}

{% if splits > 1 %}
    // Workgroups with z = s sum the stretch s of the contraction; the low-rank part goes with the first.
    let first_k = group.z * {{ split_length }}u;
    let last_k = min(first_k + {{ split_length }}u, contraction);
{% else %}
    let first_k = 0u;
    let last_k = contraction;
{% endif %}
{% if buffers == 2 %}
    var buffer = 0u;
{% endif %}
{{ fetch("first_k") }}
{% if splits > 1 %}
    if (group.z == 0u) {
{% endif %}
{% for member in members %}
{% if not transposed %}
    if (first_column < {{ member.stop }}u && first_column + tile_columns > {{ member.start }}u) {
{% endif %}
    for (var k = 0u; k < {{ rank }}u; k += {{ low_steps }}u) {
{# The power of a member's rows goes from low, where it is too large for f16, to the factor. #}
{% set low_back = "powers[factor_power_at] / powers[%du] * " % member.start if low_carries else "" %}
        // All loads first: each would otherwise wait for the one before.
{% for i in range(low_x_units) %}
        let low_unit_{{ i }} = lane + {{ i * lanes }}u;
        let low_quad_{{ i }} = low_unit_{{ i }} % {{ low_steps // 4 }}u;
        let low_row_{{ i }} = low_unit_{{ i }} / {{ low_steps // 4 }}u;
        var low_{{ i }} = vec4<f32>();
        if (k + 4u * low_quad_{{ i }} < {{ rank }}u) {
            low_{{ i }} = {{ "x_power(first_row + low_row_%d) * " % i if x_scaled }}{{ low_back }}low[(min(first_row + low_row_{{ i }}, last_row) * {{ low_stride }}u + {{ member.low_start }}u + k) / 4u + low_quad_{{ i }}];
        }
{% endfor %}
{% for i in range(low_w_units) %}
        var factor_{{ i }} = vec4<f32>();
{% if transposed %}
        let factor_quad_{{ i }} = (lane + {{ i * lanes }}u) % {{ tile_columns // 4 }}u;
        let factor_step_{{ i }} = (lane + {{ i * lanes }}u) / {{ tile_columns // 4 }}u;
        let factor_column_{{ i }} = first_column + 4u * factor_quad_{{ i }};
        if (k + factor_step_{{ i }} < {{ rank }}u && factor_column_{{ i }} < n_columns) {
            factor_{{ i }} = {{ "powers[factor_power_at] * " if powered }}factor[(({{ member.low_start }}u + k + factor_step_{{ i }}) * n_columns + factor_column_{{ i }}) / 4u];
        }
{% else %}
        let factor_quad_{{ i }} = (lane + {{ i * lanes }}u) % {{ low_steps // 4 }}u;
        let factor_line_{{ i }} = (lane + {{ i * lanes }}u) / {{ low_steps // 4 }}u;
        let factor_column_{{ i }} = first_column + factor_line_{{ i }};
        if (factor_column_{{ i }} >= {{ member.start }}u && factor_column_{{ i }} < {{ member.stop }}u && k + 4u * factor_quad_{{ i }} < {{ rank }}u) {
            factor_{{ i }} = {{ "powers[%s] * " % ("factor_column_%d" % i if low_carries else "factor_power_at") if powered }}{{ scale }} * factor[((factor_column_{{ i }} - {{ member.start }}u + {{ member.factor_start }}u) * {{ rank }}u + k) / 4u + factor_quad_{{ i }}];
        }
{% endif %}
{% endfor %}
        workgroupBarrier();
{% for i in range(low_x_units) %}
{% if (i + 1) * lanes > low_steps * tile_rows // 4 %}
        if (low_unit_{{ i }} < {{ low_steps * tile_rows // 4 }}u) {
            store_x(0u, low_row_{{ i }}, 4u * low_quad_{{ i }}, {{ stored("low_" ~ i, tile_type) }});
        }
{% else %}
        store_x(0u, low_row_{{ i }}, 4u * low_quad_{{ i }}, {{ stored("low_" ~ i, tile_type) }});
{% endif %}
{% endfor %}
{% for i in range(low_w_units) %}
        if (lane + {{ i * lanes }}u < {{ low_steps * tile_columns // 4 }}u) {
{% if transposed %}
            w_tile[w_at(factor_step_{{ i }}, factor_quad_{{ i }})] = vec4<{{ tile_type }}>(factor_{{ i }});
{% else %}
{% for c in range(4) %}
            w_tile[w_at(4u * factor_quad_{{ i }} + {{ c }}u, factor_line_{{ i }} / 4u)][factor_line_{{ i }} % 4u] = {{ tile_type }}(factor_{{ i }}[{{ c }}]);
{% endfor %}
{% endif %}
        }
{% endfor %}
        workgroupBarrier();
{{ begin_parts() }}
        for (var step = 0u; step < {{ low_steps }}u; step += 4u) {
{% for s in range(4) %}
{{ multiply_step("step + " ~ s ~ "u") }}
{% endfor %}
        }
{{ end_parts() }}
    }
{% if not transposed %}
    }
{% endif %}
{% endfor %}
{% if splits > 1 %}
    }
{% endif %}

{% if buffers == 2 %}
    workgroupBarrier();
{{ store_tiles() }}
    workgroupBarrier();
{% endif %}
    for (var k = first_k; k < last_k; k += depth) {
{% if buffers == 1 %}
        workgroupBarrier();
{{ store_tiles() }}
        workgroupBarrier();
{% endif %}
        let ahead = select(k, k + depth, k + depth < last_k);
{{ fetch("ahead") }}
{% if unroll >= depth %}
{% for first in range(0, depth, carry) %}
        {
{{ begin_parts() }}
{% for step in range(first, [first + carry, depth] | min) %}
{{ multiply_step(step ~ "u") }}
{% endfor %}
{{ end_parts() }}
        }
{% endfor %}
{% else %}
        for (var step = 0u; step < depth; step += {{ unroll }}u) {
{{ begin_parts() }}
{% for s in range(unroll) %}
{{ multiply_step("step + " ~ s ~ "u") }}
{% endfor %}
{{ end_parts() }}
        }
{% endif %}
{% if buffers == 2 %}
        buffer = 1u - buffer;
{{ store_tiles() }}
        workgroupBarrier();
{% endif %}
    }

{% for i in range(lane_rows) %}
    {
        let row = first_row + {{ i // 4 * lanes_y * 4 + i % 4 }}u + 4u * lane_y;
        if (row < extent.rows) {
{% for j in range(column_quads) %}
            {
                let column = first_column + {{ j * lanes_x * 4 }}u + 4u * lane_x;
                if (column < n_columns) {
                    store({{ "row + group.z * " ~ maximum_rows ~ "u" if splits > 1 else "row" }}, column, sum_{{ i }}_{{ j }}{{ " * out_power(row)" if x_scaled or powered }});
                }
            }
{% endfor %}
        }
    }
{% endfor %}
}
