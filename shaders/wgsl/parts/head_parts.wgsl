{# What head_norm_rope.wgsl and its backward share: the columns of a head in the registers of `sum_lanes`
   lanes, and their rotation by the binding `tables`.

   A head is stretches (name, first quad, quads): what rope turns, with halves as two stretches so that
   one lane holds both numbers of a pair, and the rest. `half` 0 turns nothing. #}
{% from "parts/row_parts.wgsl" import load_row, store_row %}
{% set n_turned = half // 2 %}
{% set turned = [("a", 0, n_turned)] if interleaved else [("a", 0, n_turned // 2), ("b", n_turned // 2, n_turned // 2)] %}
{% set stretches = turned + [("rest", n_turned, head_size // 4 - n_turned)] %}
{% set turns = (turned[0][2] + sum_lanes - 1) // sum_lanes %}

{# The registers' names, with where in the head each quad lies. #}
{% set registers = [] %}
{% for stretch, first, count in stretches %}
{% for s in range((count + sum_lanes - 1) // sum_lanes) %}
{% set _ = registers.append("%s_%d" % (stretch, s)) %}
{% endfor %}
{% endfor %}

{# Which head the lane works on: `index` counts the heads of all rows, `n_taken` a row (`taken` says which). #}
{% macro take_head(taken, n_taken) %}
    let first_index = (group.x + group.y * groups.x) * {{ lanes // sum_lanes }}u; // row · {{ taken }} heads + head
    let n_indices = extent.rows * {{ n_taken }}u;
    if (first_index >= n_indices) { return; } // uniform: the whole workgroup leaves
    let own_index = first_index + invocation / {{ sum_lanes }}u;
    let inside = own_index < n_indices; // one that is not repeats the last head and stores nothing
    let index = min(own_index, n_indices - 1u);
    let lane = invocation % {{ sum_lanes }}u;
{%- endmacro %}

{% macro load_head(name, source, from, splits=1, stride=0) %}
{% for stretch, first, count in stretches %}
{{ load_row(name ~ "_" ~ stretch, source, "%s + %du" % (from, first), count, sum_lanes, splits, stride) -}}
{% endfor %}
{% endmacro %}

{# The weight of `head`, in the registers `w`. #}
{% macro load_weight() %}
{{ load_head("w", "q_weight", "lane") }}
    if (head >= {{ n_heads }}u) {
{{ load_head("k_w", "k_weight", "lane") }}
{% for r in registers %}
        w_{{ r }} = k_w_{{ r }};
{% endfor %}
    }
{%- endmacro %}

{# Runs the statement that it is called with, given a register's name and its quad, where it lies inside the head. #}
{% macro store_head(from) %}
{% for stretch, first, count in stretches %}
{% for s in range((count + sum_lanes - 1) // sum_lanes) %}
{% set statement = caller("%s_%d" % (stretch, s), "%s + %du" % (from, first + s * sum_lanes)) | trim %}
{% call store_row(s, count, sum_lanes) %}{{ statement }}{% endcall %}
{% endfor %}
{% endfor %}
{% endmacro %}

{# The angles of row `row`'s position, a quad of pairs (interleaved: two pairs, each twice) a step. #}
{% macro load_angles(row) %}
{% if half > 0 %}
    let place = positions[{{ row }}] * {{ turned[0][2] }}u;
{% for s in range(turns) %}
    // A lane past the end, which stores nothing, takes the last.
    let unit_{{ s }} = place + min(lane + {{ s * sum_lanes }}u, {{ turned[0][2] - 1 }}u);
{% if interleaved %}
    let angles_{{ s }} = tables[unit_{{ s }}];
    let cosine_{{ s }} = angles_{{ s }}.xxzz;
    let sine_{{ s }} = angles_{{ s }}.yyww;
{% else %}
    let near_{{ s }} = tables[2u * unit_{{ s }}];
    let far_{{ s }} = tables[2u * unit_{{ s }} + 1u];
    let cosine_{{ s }} = vec4(near_{{ s }}.xz, far_{{ s }}.xz);
    let sine_{{ s }} = vec4(near_{{ s }}.yw, far_{{ s }}.yw);
{% endif %}
{% endfor %}
{% endif %}
{% endmacro %}

{# Turns the head in the registers `name`: (a, b) → (a · cos − b · sin, b · cos + a · sin), or back. #}
{% macro turn(name, inverse) %}
{% set minus, plus = ("+", "-") if inverse else ("-", "+") %}
{% for s in range(turns) %}
{% set a = "%s_a_%d" % (name, s) %}
{% set b = "%s_b_%d" % (name, s) %}
{% if interleaved %}
    {{ a }} = {{ a }} * cosine_{{ s }} {{ plus }} vec4(-{{ a }}.y, {{ a }}.x, -{{ a }}.w, {{ a }}.z) * sine_{{ s }};
{% else %}
    let first_{{ s }} = {{ a }};
    {{ a }} = first_{{ s }} * cosine_{{ s }} {{ minus }} {{ b }} * sine_{{ s }};
    {{ b }} = {{ b }} * cosine_{{ s }} {{ plus }} first_{{ s }} * sine_{{ s }};
{% endif %}
{% endfor %}
{% endmacro %}
