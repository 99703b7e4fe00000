{#
Macros of the attention kernels: two tiles in workgroup memory and the two products made of them.
A file takes them with `import … with context`; they read its constants:
    head_size, per_lane (rows of tile_a that a lane holds), chunk (vec4 columns of the head held at
    once, 8 or 16), unroll (columns in one turn of the loop of products), scale and softcap;
    and use its variables `lane`, `ty` = lane / 8 and `tx` = lane % 8.

The block of rows that a workgroup owns (queries, or keys) is side a: 8 · per_lane rows, of which a
lane holds ty, ty + 8, …. The 32 rows that it walks past at a time are side b: a lane holds rows
4 · tx … 4 · tx + 3 as the components of one vec4. Sums are named {sum}{i}, or {sum}{n}_{i} where
they are output columns: row ty + 8 · i, vec4 column 8 · n + tx.
#}
{% set head = head_size // 4 %}
{% set chunks = (head + chunk - 1) // chunk %}
{% set groups = (head + 7) // 8 %}
{% set ragged = head % chunk != 0 %}

{% macro declare_tiles() %}
const lanes = 64u;
const block = {{ 8 * per_lane }}u; // rows of side a
var<workgroup> tile_a: array<vec4<f32>, {{ 8 * per_lane * chunk }}>; // [row][column]
var<workgroup> tile_b: array<vec4<f32>, {{ 32 * chunk }}>; // transposed, or [row][column]
var<workgroup> weights: array<vec4<f32>, {{ 8 * per_lane * 8 }}>; // [row of a][4 rows of b]
{% endmacro %}

{#
Loads take the rows `first` … of `buffer`, `stride` vec4 long, from vec4 column `offset` + `column`.
A row at or past `end` repeats row end - 1: the kernels give it no weight and do not write it, but
what lies there may be stale, NaN even, and 0 · NaN is not 0. In the same way columns past the head
repeat its last one; tile_a has zeros there, so that they add nothing to products.
#}
{% macro load_a(buffer, first, end, stride, offset, column) %}
    {
        {{ lane_column(column) }}
        let r = {{ first }} + lane / {{ chunk }}u;
    {% for n in range(per_lane * chunk // 8) %}
        {
            let row = min(r + {{ n * 64 // chunk }}u, {{ end }} - 1u);
            let value = {{ buffer }}[row * {{ stride }}u + {{ offset }} + c];
    {% if ragged %}
            tile_a[lane + {{ 64 * n }}u] =
                select(vec4<f32>(), value, {{ column }} + lane % {{ chunk }}u < {{ head }}u);
    {% else %}
            tile_a[lane + {{ 64 * n }}u] = value;
    {% endif %}
        }
    {% endfor %}
    }
{% endmacro %}

{% macro lane_column(column, of="lane") %}
    {% if ragged %}
        let c = min({{ column }} + {{ of }} % {{ chunk }}u, {{ head - 1 }}u);
    {% else %}
        let c = {{ column }} + {{ of }} % {{ chunk }}u;
    {% endif %}
{% endmacro %}

{# 32 rows into tile_b as [row][column]. #}
{% macro load_b(buffer, first, end, stride, offset, column) %}
    {
        {{ lane_column(column) }}
        let r = {{ first }} + lane / {{ chunk }}u;
    {% for n in range(chunk // 2) %}
        tile_b[lane + {{ 64 * n }}u] = {{ buffer }}[
            min(r + {{ n * 64 // chunk }}u, {{ end }} - 1u) * {{ stride }}u + {{ offset }} + c
        ];
    {% endfor %}
    }
{% endmacro %}

{#
32 rows into tile_b, transposed: scalar column 4c + j of rows 4g … 4g + 3 is the vec4 at
(4c + j) · 8 + (g xor c mod 8); the xor keeps stores and loads free of bank conflicts.
#}
{% macro load_b_transposed(buffer, first, end, stride, offset, column) %}
    {% for n in range(chunk // 8) %}
    {
        let piece = lane + {{ 64 * n }}u;
        {{ lane_column(column, "piece") }}
        let g = piece / {{ chunk }}u;
    {% for j in range(4) %}
        let v{{ j }} = {{ buffer }}[
            min({{ first }} + 4u * g + {{ j }}u, {{ end }} - 1u) * {{ stride }}u + {{ offset }} + c
        ];
    {% endfor %}
        let to = piece % {{ chunk }}u * 32u + (g ^ (piece % 8u));
    {% for j in range(4) %}
    {% set x = "xyzw"[j] %}
        tile_b[to + {{ 8 * j }}u] = vec4<f32>(v0.{{ x }}, v1.{{ x }}, v2.{{ x }}, v3.{{ x }});
    {% endfor %}
    }
    {% endfor %}
{% endmacro %}

{# {sum}{i} += row i of a · the lane's 4 rows of b (transposed), columns in ascending order. #}
{% macro add_products(sum) %}
    for (var c = 0u; c < {{ chunk }}u; c += {{ unroll }}u) {
    {% for n in range(unroll) %}
        {
            let b = (c + {{ n }}u) * 32u + (tx ^ ((c + {{ n }}u) % 8u));
    {% for j in range(4) %}
            let b{{ j }} = tile_b[b + {{ 8 * j }}u];
    {% endfor %}
    {% for i in range(per_lane) %}
            let a{{ i }} = tile_a[(ty + {{ 8 * i }}u) * {{ chunk }}u + c + {{ n }}u];
    {% for j in range(4) %}
            {{ sum }}{{ i }} = fma(vec4<f32>(a{{ i }}.{{ "xyzw"[j] }}), b{{ j }}, {{ sum }}{{ i }});
    {% endfor %}
    {% endfor %}
        }
    {% endfor %}
    }
{% endmacro %}

{#
{sum}{n}_{i} += weights[i] · tile_b [row][column], rows of b in ascending order; `total`{i}, if
given, += the weights alone. A weight of 0 changes nothing, not a bit.
#}
{% macro add_weighted(sum, k, total="") %}
    for (var g = 0u; g < 8u; g += 1u) {
    {% for i in range(per_lane) %}
        let w{{ i }} = weights[(ty + {{ 8 * i }}u) * 8u + g];
    {% if total %}
    {% for x in "xyzw" %}
        {{ total }}{{ i }} += w{{ i }}.{{ x }};
    {% endfor %}
    {% endif %}
    {% endfor %}
    {% for n in range(k * chunk // 8, [(k + 1) * chunk // 8, groups] | min) %}
    {% for j in range(4) %}
        let b{{ n }}_{{ j }} =
            tile_b[(4u * g + {{ j }}u) * {{ chunk }}u + {{ 8 * n - k * chunk }}u + tx];
    {% endfor %}
    {% for i in range(per_lane) %}
    {% for j in range(4) %}
        {{ sum }}{{ n }}_{{ i }} =
            fma(vec4<f32>(w{{ i }}.{{ "xyzw"[j] }}), b{{ n }}_{{ j }}, {{ sum }}{{ n }}_{{ i }});
    {% endfor %}
    {% endfor %}
    {% endfor %}
    }
{% endmacro %}

{# Scores from products: {s}{i} becomes the scaled (and capped) score; with a cap, t{i} its tanh. #}
{% macro scale_scores(s) %}
    {% for i in range(per_lane) %}
    {% if softcap %}
        // Some drivers' tanh overflows; beyond ±10 it is ±1 in f32.
        let t{{ i }} = tanh(clamp(
            {{ s }}{{ i }} * {{ scale / softcap }}, vec4<f32>(-10.0), vec4<f32>(10.0)
        ));
        {{ s }}{{ i }} = t{{ i }} * {{ softcap }};
    {% else %}
        {{ s }}{{ i }} *= {{ scale }};
    {% endif %}
    {% endfor %}
{% endmacro %}
