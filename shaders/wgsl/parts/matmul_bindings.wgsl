// Bindings, decoding and the epilogue that the bodies of the quantized matmul share. x and out are of
// x_type and out_type (f32 or f16), all other numbers f32. x_by_eights, w_by_eights: f16, eight an element.

struct Extent { rows: u32 }
struct Eight { a: vec4<f32>, b: vec4<f32> }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<{{ "vec4<u32>" if x_by_eights | default(false) else "vec4<" ~ x_type ~ ">" }}>;
@group(0) @binding(2) var<storage, read> weights: array<{{ "vec4<u32>" if w_by_eights | default(false) else "u32" }}>;
@group(0) @binding(3) var<storage, read_write> out: array<vec4<{{ out_type }}>>;
{% if members %}
@group(0) @binding(4) var<storage, read> low: array<vec4<f32>>;
@group(0) @binding(5) var<storage, read> factor: array<vec4<f32>>;
{% endif %}
{% set after_low = 6 if members else 4 %}
{% if paired | default(false) %}
@group(0) @binding({{ after_low }}) var<storage, read> x_largest: array<u32>;
{% set after_low = after_low + 1 %}
{% if not w_exact %}
@group(0) @binding({{ after_low }}) var<storage, read> w_largest: array<u32>;
{% set after_low = after_low + 1 %}
{% endif %}
{% endif %}
{% if epilogue == "residual" %}
@group(0) @binding({{ after_low }}) var<storage, read> residual: array<vec4<f32>>;
{% endif %}
{% if bias %}
@group(0) @binding({{ after_low + (epilogue == "residual") }}) var<storage, read> bias: array<vec4<f32>>;
{% endif %}

{% if placed %}
// Parts of one matrix share a kernel: where the columns of this part begin in x and in out.
struct Place { x_column: u32, out_column: u32 }
@group(0) @binding({{ after_low + (epilogue == "residual") + bias }}) var<uniform> place: Place;
{% endif %}

const contraction = {{ contraction }}u;
const n_columns = {{ n_columns }}u;
const columns = {{ weight_columns }}u; // of the weight matrix
const row_words = {{ row_words }}u;
const x_stride = {{ x_stride }}u;
const out_stride = {{ out_stride }}u;

{% if not w_by_eights | default(false) %}
{% include "decode/" ~ quantization ~ ".wgsl" %}
{% endif %}

{% include "parts/matmul_epilogue.wgsl" %}

fn store(row: u32, column: u32, value: vec4<f32>) {
    let out_column = {{ "place.out_column" if placed else "0u" }};
    write_out((row * out_stride + out_column + column) / 4u, (out_column + column) / 4u, value);
}
