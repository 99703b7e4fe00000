{% from "parts/stored.wgsl" import stored %}
// What a finished product passes on its way out: + bias, the soft cap cap · tanh(y / cap), + residual.
// `at` is the place of four columns in out, `quad` of the same in a bias.
fn write_out(at: u32, quad: u32, product: vec4<f32>) {
    var value = product;
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
