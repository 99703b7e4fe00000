// Bindings, decoding and the epilogue that the bodies of the quantized matmul share. x and out are of
// x_type and out_type (f32 or f16), all other numbers f32. x_by_eights, w_by_eights: f16, eight an element.
//
// x_scaled: x [rows] are f32 in tiles of f16, each row multiplied by the power of two that brings its largest
// number, whose bits x_largest [rows] has, to 2^4 … 2^5; what comes out is divided by it again. Rows of f16 are so already.
// powered: powers [rows of W + 2]. Row n of W is multiplied by powers[n], the factor of the low-rank part by
// the one behind them, what comes out by the last.

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
{% set paired = paired | default(false) %}
{% if paired or x_scaled %}
@group(0) @binding({{ after_low }}) var<storage, read> x_largest: array<u32>;
{% set after_low = after_low + 1 %}
{% endif %}
{% if paired and not w_exact %}
@group(0) @binding({{ after_low }}) var<storage, read> w_largest: array<u32>;
{% set after_low = after_low + 1 %}
{% endif %}
{% if powered %}
@group(0) @binding({{ after_low }}) var<storage, read> powers: array<f32>;
{% set after_low = after_low + 1 %}
{% endif %}
{% if epilogue == "residual" %}
@group(0) @binding({{ after_low }}) var<storage, read> residual: array<vec4<f32>>;
{% set after_low = after_low + 1 %}
{% endif %}
{% if bias %}
@group(0) @binding({{ after_low }}) var<storage, read> bias: array<vec4<f32>>;
{% set after_low = after_low + 1 %}
{% endif %}
{% if scaled %}
// Of the columns of out; and the product before these, as out is laid out.
@group(0) @binding({{ after_low }}) var<storage, read> scales: array<vec4<f32>>;
@group(0) @binding({{ after_low + 1 }}) var<storage, read_write> kept: array<vec4<{{ scaled.kept_type }}>>;
{% set after_low = after_low + 2 %}
{% endif %}
{% if placed %}
// Parts of one matrix share a kernel: where the columns of this part begin in x and in out.
struct Place { x_column: u32, out_column: u32 }
@group(0) @binding({{ after_low }}) var<uniform> place: Place;
{% set after_low = after_low + 1 %}
{% endif %}
{% if dropout | default(none) and members %}
// Keys of the rows, and of the members' matrices.
@group(0) @binding({{ after_low }}) var<storage, read> row_keys: array<u32>;
@group(0) @binding({{ after_low + 1 }}) var<uniform> matrix_keys: vec4<u32>;

{% include "parts/dropout.wgsl" %}
{% endif %}

const contraction = {{ contraction }}u;
const n_columns = {{ n_columns }}u;
const columns = {{ weight_columns }}u; // of the weight matrix
const row_words = {{ row_words }}u;
const x_stride = {{ x_stride }}u;
const out_stride = {{ out_stride }}u;

{% if not w_by_eights | default(false) %}
{% include "decode/" ~ quantization ~ ".wgsl" %}
{% if powered %}

fn powered8(row: u32, k: u32) -> Eight {
    let eight = decode8(row, k);
    return Eight(eight.a * powers[row], eight.b * powers[row]);
}
{% endif %}
{% endif %}
{% if x_scaled or powered %}
{% set w_rows = contraction if transposed else n_columns %}

// What the numbers of a row of x are multiplied by, and what its sums are.
{% if x_scaled %}
{% from "parts/row_power.wgsl" import row_exponent %}
fn x_exponent(row: u32) -> i32 {
    return {{ row_exponent("x_largest[min(row, extent.rows - 1u)]") }};
}
fn x_power(row: u32) -> f32 { return bitcast<f32>(u32(127 + x_exponent(row)) << 23u); }
{% endif %}
{% if powered %}
const factor_power_at = {{ w_rows }}u;
{% endif %}
fn out_power(row: u32) -> f32 {
    return {{ "bitcast<f32>(u32(127 - x_exponent(row)) << 23u)" if x_scaled else "1.0" }}{{ " * powers[%du]" % (w_rows + 1) if powered }};
}
{% endif %}

{% include "parts/matmul_epilogue.wgsl" %}

fn store(row: u32, column: u32, value: vec4<f32>) {
    let out_column = {{ "place.out_column" if placed else "0u" }};
    write_out((row * out_stride + out_column + column) / 4u, (out_column + column) / 4u, value);
}
