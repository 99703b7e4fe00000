{% from "parts/stored.wgsl" import stored %}
// What a finished product passes on its way out: {{ "kept as it is, times its column's scale, " if scaled | default(none) }}+ bias, the soft cap cap · tanh(y / cap), + residual.
// `at` is the place of four columns in out, `quad` of the same in a bias.
fn write_out(at: u32, quad: u32, product: vec4<f32>) {
    var value = product;
{% if scaled | default(none) %}
    kept[at] = {{ stored("value", scaled.kept_type) }};
    value *= scales[quad];
{% endif %}
{% if bias %}
    value += bias[quad];
{% endif %}
{% if softcap %}
    // Some drivers' tanh overflows; beyond ±10 it is ±1 in f32.
    value = {{ softcap }} * tanh(clamp(value / {{ softcap }}, vec4<f32>(-10.0), vec4<f32>(10.0)));
{% endif %}
{% if epilogue == "residual" %}
    value += residual[at];
{% elif epilogue == "accumulate" %}
    value += vec4<f32>(out[at]);
{% endif %}
    out[at] = {{ stored("value", out_type) }};
}
