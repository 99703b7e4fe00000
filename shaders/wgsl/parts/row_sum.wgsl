{# `lanes` of the workgroup (64 by default), of which `sum_lanes` neighbours (by default all) share a
   `reduction` ("sum" by default, or "max") of `sum_type` (f32 by default). #}
{% set n_lanes = lanes | default(64) %}
{% set n_shared = sum_lanes | default(n_lanes) %}
{% set type = sum_type | default("f32") %}
{% set kind = reduction | default("sum") %}
{% set n_parts = 16 if n_shared > 128 else 8 %}
{% macro combine(name, value) %}{{ name }} = {{ "max(%s, %s)" % (name, value) if kind == "max" else "%s + %s" % (name, value) }}{% endmacro %}
// The {{ kind }} of one value a lane over {{ n_shared }} neighbouring lanes, in a fixed order, so that one input
// gives one result bit for bit. Every lane of the workgroup must call it{{ ", only once" if n_shared <= 32 }}; every lane gets its
// {{ kind }}. Barriers cost more than reads here: each lane reads {{ "all values" if n_shared <= 32 else "a part's values, then all parts" }} itself.
var<workgroup> lane_{{ kind }}: array<{{ type }}, {{ n_lanes }}>;
{% if n_shared > 32 %}
var<workgroup> part_{{ kind }}: array<{{ type }}, {{ n_lanes // n_shared * n_parts }}>;
{% endif %}

fn row_{{ kind }}(value: {{ type }}, lane: u32) -> {{ type }} {
    lane_{{ kind }}[lane] = value;
    workgroupBarrier();
{% if n_shared <= 32 %}
    let first = lane / {{ n_shared }}u * {{ n_shared }}u;
    var whole = lane_{{ kind }}[first];
{% for i in range(1, n_shared) %}
    {{ combine("whole", "lane_%s[first + %du]" % (kind, i)) }};
{% endfor %}
{% else %}
    let part = lane % {{ n_parts }}u;
    let first = lane / {{ n_shared }}u * {{ n_shared }}u + part;
    var of_part = lane_{{ kind }}[first];
{% for i in range(n_parts, n_shared, n_parts) %}
    {{ combine("of_part", "lane_%s[first + %du]" % (kind, i)) }};
{% endfor %}
    let first_part = lane / {{ n_shared }}u * {{ n_parts }}u;
    if (lane % {{ n_shared }}u < {{ n_parts }}u) { part_{{ kind }}[first_part + part] = of_part; }
    workgroupBarrier();
    var whole = part_{{ kind }}[first_part];
{% for i in range(1, n_parts) %}
    {{ combine("whole", "part_%s[first_part + %du]" % (kind, i)) }};
{% endfor %}
{% endif %}
    return whole;
}
