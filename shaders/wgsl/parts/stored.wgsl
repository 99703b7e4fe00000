{# A vec4<f32> as an array of `type` holds it. Beyond ±65504 f16 is infinite, which the loss and the norm show. #}
{% macro stored(value, type) -%}
{{ "vec4<f16>(" ~ value ~ ")" if type == "f16" else value }}
{%- endmacro %}
