// The gate's activation and its derivative.
{% if activation == "silu" %}
// silu(g) = g · sigmoid(g)
fn gate_value(g: vec4<f32>) -> vec4<f32> {
    return g / (1.0 + exp(-g));
}

fn gate_slope(g: vec4<f32>) -> vec4<f32> {
    let s = 1.0 / (1.0 + exp(-g));
    return s * (1.0 + g * (1.0 - s));
}
{% elif activation == "gelu_tanh" %}
// gelu(g) ≈ g/2 · (1 + tanh(u)) = g · sigmoid(2u), u = sqrt(2/π) · (g + 0.044715 g³): the sigmoid does
// not cancel in the left tail as 1 + tanh does. Past the clamp it is 0 or 1 in f32.
const gelu_scale = 0.7978845608028654;

fn gelu_sigmoid(g: vec4<f32>) -> vec4<f32> {
    let u = gelu_scale * (g + 0.044715 * g * g * g);
    return 1.0 / (1.0 + exp(clamp(-2.0 * u, vec4(-80.0), vec4(80.0))));
}

fn gate_value(g: vec4<f32>) -> vec4<f32> {
    return g * gelu_sigmoid(g);
}

fn gate_slope(g: vec4<f32>) -> vec4<f32> {
    let s = gelu_sigmoid(g);
    return s + 2.0 * g * s * (1.0 - s) * gelu_scale * (1.0 + 0.134145 * g * g);
}
{% endif %}
