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

{% include "matmul_bindings.wgsl" %}

const tile_rows = {{ tile_rows }}u;
const tile_columns = {{ tile_columns }}u;
const depth = {{ depth }}u;
{% set lanes_x = tile_columns // lane_columns %}
{% set lanes_y = tile_rows // lane_rows %}
{% set lanes = lanes_x * lanes_y %}
{% set row_quads = lane_rows // 4 %}
{% set column_quads = lane_columns // 4 %}

// [depth][tile / 4], a vec4 holding four neighbouring rows (columns).
var<workgroup> x_tile: array<vec4<f32>, {{ depth * tile_rows // 4 }}>;
var<workgroup> w_tile: array<vec4<f32>, {{ depth * tile_columns // 4 }}>;

{# Loads a tile of [rows, stride] (x or low), transposed. #}
{% macro load_rows(source, stride, column, limit) %}
{% for i in range((tile_rows * depth // 4 + lanes - 1) // lanes) %}
        {
            let unit = lane + {{ i * lanes }}u;
{% if (i + 1) * lanes > tile_rows * depth // 4 %}
            if (unit < {{ tile_rows * depth // 4 }}u) {
{% endif %}
            let m = unit % tile_rows;
            let quad = unit / tile_rows;
            var value = vec4<f32>();
            if (first_row + m < extent.rows && k + 4u * quad < {{ limit }}) {
                value = {{ source }}[((first_row + m) * {{ stride }} + {{ column }} + k) / 4u + quad];
            }
{% for c in range(4) %}
            x_tile[((4u * quad + {{ c }}u) * tile_rows + m) / 4u][m % 4u] = value[{{ c }}];
{% endfor %}
{% if (i + 1) * lanes > tile_rows * depth // 4 %}
            }
{% endif %}
        }
{% endfor %}
{% endmacro %}

{# Multiplies the two tiles into the accumulators. #}
{% macro multiply(steps) %}
        workgroupBarrier();
        for (var step = 0u; step < {{ steps }}u; step += 1u) {
{% for i in range(row_quads) %}
            let a_{{ i }} = x_tile[step * {{ tile_rows // 4 }}u + {{ i * lanes_y }}u + lane_y];
{% endfor %}
{% for j in range(column_quads) %}
            let b_{{ j }} = w_tile[step * {{ tile_columns // 4 }}u + {{ j * lanes_x }}u + lane_x];
{% endfor %}
{% for i in range(lane_rows) %}
{% for j in range(column_quads) %}
            sum_{{ i }}_{{ j }} += a_{{ i // 4 }}[{{ i % 4 }}] * b_{{ j }};
{% endfor %}
{% endfor %}
        }
        workgroupBarrier();
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
    let lane_x = lane % {{ lanes_x }}u;
    let lane_y = lane / {{ lanes_x }}u;
{% for i in range(lane_rows) %}
{% for j in range(column_quads) %}
    var sum_{{ i }}_{{ j }} = vec4<f32>();
{% endfor %}
{% endfor %}

{% if splits > 1 %}
    // Workgroups with z = s sum the stretch s of the contraction; the low-rank part goes with the first.
    let first_k = group.z * {{ split_length }}u;
    let last_k = min(first_k + {{ split_length }}u, contraction);
    if (group.z == 0u) {
{% else %}
    let first_k = 0u;
    let last_k = contraction;
{% endif %}
{% for member in members %}
{% set steps = [depth, rank] | min %}
{% if not transposed %}
    if (first_column < {{ member.stop }}u && first_column + tile_columns > {{ member.start }}u) {
{% endif %}
    for (var k = 0u; k < {{ rank }}u; k += depth) {
{{ load_rows("low", low_stride ~ "u", member.low_start ~ "u", rank ~ "u") }}
        for (var unit = lane; unit < {{ tile_columns * depth // 4 }}u; unit += {{ lanes }}u) {
{% if transposed %}
            let quad = unit % {{ tile_columns // 4 }}u;
            let r = k + unit / {{ tile_columns // 4 }}u;
            let column = first_column + 4u * quad;
            var value = vec4<f32>();
            if (r < {{ rank }}u && column < n_columns) {
                value = factor[(({{ member.low_start }}u + r) * n_columns + column) / 4u];
            }
            w_tile[unit] = value;
{% else %}
            let n = unit % tile_columns;
            let quad = unit / tile_columns;
            let column = first_column + n;
            var value = vec4<f32>();
            if (column >= {{ member.start }}u && column < {{ member.stop }}u && k + 4u * quad < {{ rank }}u) {
                value = {{ scale }} * factor[((column - {{ member.start }}u + {{ member.factor_start }}u) * {{ rank }}u + k) / 4u + quad];
            }
            w_tile[((4u * quad) * tile_columns + n) / 4u][n % 4u] = value.x;
            w_tile[((4u * quad + 1u) * tile_columns + n) / 4u][n % 4u] = value.y;
            w_tile[((4u * quad + 2u) * tile_columns + n) / 4u][n % 4u] = value.z;
            w_tile[((4u * quad + 3u) * tile_columns + n) / 4u][n % 4u] = value.w;
{% endif %}
        }
{{ multiply(steps) }}
    }
{% if not transposed %}
    }
{% endif %}
{% endfor %}
{% if splits > 1 %}
    }
{% endif %}

    for (var k = first_k; k < last_k; k += depth) {
{{ load_rows("x", "x_stride", "x_column", "contraction") }}
        for (var unit = lane; unit < {{ tile_columns * depth // 8 }}u; unit += {{ lanes }}u) {
{% if transposed %}
            let eight = unit % {{ tile_columns // 8 }}u;
            let n = k + unit / {{ tile_columns // 8 }}u;
            let column = first_column + 8u * eight;
            var w = Eight();
            if (n < contraction && column < n_columns) {
                w = decode8(n, column);
            }
            w_tile[2u * unit] = w.a;
            w_tile[2u * unit + 1u] = w.b;
{% else %}
            let n = unit % tile_columns;
            let eight = unit / tile_columns;
            var w = Eight();
            if (first_column + n < n_columns && k + 8u * eight < contraction) {
                w = decode8(first_column + n, k + 8u * eight);
            }
            let at = (8u * eight * tile_columns + n) / 4u;
{% for c in range(8) %}
            w_tile[at + {{ c * tile_columns // 4 }}u][n % 4u] = w.{{ "a" if c < 4 else "b" }}[{{ c % 4 }}];
{% endfor %}
{% endif %}
        }
{{ multiply(depth) }}
    }

{% for i in range(lane_rows) %}
    {
        let row = first_row + {{ i // 4 * lanes_y * 4 + i % 4 }}u + 4u * lane_y;
        if (row < extent.rows) {
{% for j in range(column_quads) %}
            {
                let column = first_column + {{ j * lanes_x * 4 }}u + 4u * lane_x;
                if (column < n_columns) {
                    store({{ "row + group.z * " ~ maximum_rows ~ "u" if splits > 1 else "row" }}, column, sum_{{ i }}_{{ j }});
                }
            }
{% endfor %}
        }
    }
{% endfor %}
}
