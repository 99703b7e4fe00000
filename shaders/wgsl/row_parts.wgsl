{# A row of `quads` vec4s, f32 or f16, in the registers of `lanes` lanes as f32: step s of a lane is quad
   lane + s · lanes. #}
{% macro load_row(name, source, from, quads, lanes) %}
{% for s in range((quads + lanes - 1) // lanes) %}
    var {{ name }}_{{ s }} = vec4<f32>();
{% if (s + 1) * lanes <= quads %}
    {{ name }}_{{ s }} = vec4<f32>({{ source }}[{{ from }} + {{ s * lanes }}u]);
{% else %}
    if (lane < {{ quads - s * lanes }}u) { {{ name }}_{{ s }} = vec4<f32>({{ source }}[{{ from }} + {{ s * lanes }}u]); }
{% endif %}
{% endfor %}
{% endmacro %}

{# Runs the statement that it is called with where step `s` of the lane lies inside the row. #}
{% macro store_row(s, quads, lanes) %}
{% if (s + 1) * lanes <= quads %}
    {{ caller() | trim }}
{% else %}
    if (lane < {{ quads - s * lanes }}u) { {{ caller() | trim }} }
{% endif %}
{% endmacro %}
