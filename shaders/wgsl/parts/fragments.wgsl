{#
Fragments of matrix units, m × k and k × n of f16 and m × n of f32, and eights of f16 in workgroup memory.
A file takes them with `import … with context`; they read its m, n, k and emulated.
#}
{% set left_type = "subgroup_matrix_left<f16, %d, %d>" % (k, m) %}
{% set right_type = "subgroup_matrix_right<f16, %d, %d>" % (n, k) %}
{% set result_type = "subgroup_matrix_result<f32, %d, %d>" % (n, m) %}

{% macro pack_eight() %}
// Eight numbers as tiles and activations hold them. Beyond ±65504 they are infinite.
fn packed(a: vec4<f32>, b: vec4<f32>) -> vec4<u32> {
    return vec4(pack2x16float(a.xy), pack2x16float(a.zw), pack2x16float(b.xy), pack2x16float(b.zw));
}
{% if emulated %}

// One number out of eight.
fn number(words: vec4<u32>, at: u32) -> f32 {
    return unpack2x16float(words[at / 2u % 4u])[at % 2u];
}
{% endif %}
{% endmacro %}

{# The entry point of subgroups that share a workgroup, up to the workgroup's index. #}
{% macro subgroups_entry() %}
@compute @workgroup_size(lanes)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
{% if not emulated %}
    @builtin(subgroup_id) team: u32,
{% endif %}
) {
    let index = group.x + group.y * groups.x;
{% endmacro %}
