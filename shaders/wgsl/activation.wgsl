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
// gelu(g) ≈ g/2 · (1 + tanh(u)), u = sqrt(2/π) · (g + 0.044715 g³). tanh is written with a clamped
// argument: some drivers overflow inside their own for |u| > 44.
const gelu_scale = 0.7978845608028654;

fn gelu_tanh(g: vec4<f32>) -> vec4<f32> {
    return tanh(clamp(gelu_scale * (g + 0.044715 * g * g * g), vec4(-15.0), vec4(15.0)));
}

fn gate_value(g: vec4<f32>) -> vec4<f32> {
    return 0.5 * g * (1.0 + gelu_tanh(g));
}

fn gate_slope(g: vec4<f32>) -> vec4<f32> {
    let t = gelu_tanh(g);
    return 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * gelu_scale * (1.0 + 0.134145 * g * g);
}
{% endif %}
