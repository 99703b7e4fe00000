{#
The bits of the largest |number| of a row of f32, which all lanes of a workgroup look for; a NaN's are larger than those of
infinity. No order matters.
#}
{% macro declare_largest() %}
var<workgroup> largest_bits: atomic<u32>;
{%- endmacro %}

{# Of `quads` quads of x from `begin` on; behind it atomicLoad(&largest_bits) is what was found. #}
{% macro find_largest(quads, lanes) %}
    if (lane == 0u) { atomicStore(&largest_bits, 0u); }
    workgroupBarrier();
    var own = vec4<u32>();
    for (var quad = lane; quad < {{ quads }}u; quad += {{ lanes }}u) {
        own = max(own, bitcast<vec4<u32>>(abs(x[begin + quad])));
    }
    atomicMax(&largest_bits, max(max(own.x, own.y), max(own.z, own.w)));
    workgroupBarrier();
{%- endmacro %}
