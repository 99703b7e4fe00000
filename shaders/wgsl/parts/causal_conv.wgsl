{# What causal_conv.wgsl, its backward and conv_state.wgsl share: what is convolved. #}
const width = {{ width // 4 }}u; // quads of columns
const stride = {{ stride // 4 }}u; // of a row of x

// s[row, column], a quad of them.
fn source(row: u32, column: u32) -> vec4<f32> {
{% if gated %}
    return vec4<f32>(x[row * stride + column]) * vec4<f32>(x[row * stride + 2u * width + column]);
{% else %}
    return vec4<f32>(x[row * stride + column]);
{% endif %}
}
