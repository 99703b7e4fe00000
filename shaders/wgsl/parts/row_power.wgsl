{# The exponent of the power of two that brings a row of f32, the bits of whose largest number these are, to 2^4 … 2^5
   for tiles of f16: what multiplies a row and what divides by it again must agree to the bit. #}
{% macro row_exponent(bits) -%}
clamp(131 - i32({{ bits }} >> 23u), -126, 126)
{%- endmacro %}
{% macro row_power(bits) -%}
bitcast<f32>(u32(127 + {{ row_exponent(bits) }}) << 23u)
{%- endmacro %}

{# Stores a row in the registers of `lanes` lanes (row_parts.wgsl), from quad `base` on, as f16 times its power: two numbers
   in a u32, as tiles hold them. `bits`: of the row's largest number. #}
{% macro store_scaled(target, values, bits, quads, lanes) %}
{% from "parts/row_parts.wgsl" import store_row %}
    let power = {{ row_power(bits) }};
{% for s in range((quads + lanes - 1) // lanes) %}
{% call store_row(s, quads, lanes) %}
{{ target }}[base + {{ s * lanes }}u] = vec2(pack2x16float(power * {{ values }}_{{ s }}.xy), pack2x16float(power * {{ values }}_{{ s }}.zw));
{% endcall %}
{% endfor %}
{% endmacro %}
