// Bindings, decoding and the epilogue that the bodies of the quantized matmul share.

struct Extent { rows: u32 }
struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read> weights: array<u32>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<f32>>;
{% if members %}
@group(0) @binding(4) var<storage, read> low: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> factor: array<vec4<f32>>;
{% endif %}
{% if epilogue == "residual" %}
@group(0) @binding({{ 6 if members else 4 }}) var<storage, read> residual: array<vec4<f32>>;
{% endif %}

const contraction = {{ contraction }}u;
const n_columns = {{ n_columns }}u;
const columns = {{ weight_columns }}u; // of the weight matrix
const row_words = {{ row_words }}u;
const x_stride = {{ x_stride }}u;
const x_column = {{ x_column }}u;
const out_stride = {{ out_stride }}u;
const out_column = {{ out_column }}u;

{% include "decode/" ~ quantization ~ ".wgsl" %}

fn store(row: u32, column: u32, value: vec4<f32>) {
    let at = (row * out_stride + out_column + column) / 4u;
{% if epilogue == "residual" %}
    out[at] = residual[at] + value;
{% elif epilogue == "accumulate" %}
    out[at] += value;
{% else %}
    out[at] = value;
{% endif %}
}
