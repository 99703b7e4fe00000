{# What span_norm.wgsl and its backward share: the group of columns that a workgroup works on. `spans` has for each span
   its groups' number and, in quads, their size, the step from one to the next in x, where the first begins in x and in y, and its weight (-1: none), and whether it is normed. #}
{% macro take_group() %}
    let index = group.x + group.y * groups.x;
    let row = index / {{ spans | sum(attribute="count") }}u;
    if (row >= extent.rows) { return; } // uniform: the whole workgroup leaves
    let number = index % {{ spans | sum(attribute="count") }}u;
    var quads = 0u;
    var x_at = row * {{ x_stride // 4 }}u;
    var y_at = row * {{ y_stride // 4 }}u;
    var weighted = false;
    var weight_at = 0u;
    var normed = true;
{% set before = namespace(groups=0) %}
{% for span in spans %}
    if (number >= {{ before.groups }}u && number < {{ before.groups + span.count }}u) {
        quads = {{ span.quads }}u;
        x_at += {{ span.source }}u + (number - {{ before.groups }}u) * {{ span.step }}u;
        y_at += {{ span.target }}u + (number - {{ before.groups }}u) * quads;
{% if not span.normed %}
        normed = false;
{% endif %}
{% if span.weight >= 0 %}
        weighted = true;
        weight_at = {{ span.weight }}u;
{% endif %}
    }
{% set before.groups = before.groups + span.count %}
{% endfor %}
{%- endmacro %}
