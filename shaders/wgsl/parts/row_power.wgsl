{# The exponent of the power of two that brings a row of f32, the bits of whose largest number these are, to 2^4 … 2^5
   for tiles of f16: what multiplies a row and what divides by it again must agree to the bit. #}
{% macro row_exponent(bits) -%}
clamp(131 - i32({{ bits }} >> 23u), -126, 126)
{%- endmacro %}
