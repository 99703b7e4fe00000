{% from "parts/stored.wgsl" import stored %}
{# A row of `quads` vec4s, f32 or f16, in the registers of `lanes` lanes as f32: step s of a lane is quad
   lane + s · lanes. With `splits` it is the sum of so many rows `stride` quads apart, in their order. #}
{% macro load_row(name, source, from, quads, lanes, splits=1, stride=0) %}
{% for s in range((quads + lanes - 1) // lanes) %}
    var {{ name }}_{{ s }} = vec4<f32>();
{% if (s + 1) * lanes <= quads %}
    {{ name }}_{{ s }} = {{ added(source, from, s * lanes, splits, stride) }};
{% else %}
    if (lane < {{ quads - s * lanes }}u) { {{ name }}_{{ s }} = {{ added(source, from, s * lanes, splits, stride) }}; }
{% endif %}
{% endfor %}
{% endmacro %}
{# Σ of so many vec4s `stride` quads apart, in their order. #}
{% macro added(source, from, first, splits, stride) -%}
{% for i in range(splits) %}{{ " + " if i }}vec4<f32>({{ source }}[{{ from }} + {{ first + i * stride }}u]){% endfor %}
{%- endmacro %}

{# What is left of a row in registers once an array of `type` has held it. #}
{% macro round_row(name, type, quads, lanes) %}
{% if type == "f16" %}
{% for s in range((quads + lanes - 1) // lanes) %}
    {{ name }}_{{ s }} = vec4<f32>({{ stored("%s_%d" % (name, s), type) }});
{% endfor %}
{% endif %}
{% endmacro %}

{# Runs the statement that it is called with where step `s` of the lane lies inside the row. #}
{% macro store_row(s, quads, lanes) %}
{% if (s + 1) * lanes <= quads %}
    {{ caller() | trim }}
{% else %}
    if (lane < {{ quads - s * lanes }}u) { {{ caller() | trim }} }
{% endif %}
{% endmacro %}
