// A row's weights as w = scale.x · q - scale.y with whole q, so that a product decodes no scale for each
// weight: Σ v w = scale.x · Σ v q - scale.y · Σ v. A q comes out of its bits by three instructions that
// GPUs run at full speed, and conversions from integers are not among these: put into the last bits of
// the number 2^23 it is added to it exactly. Of a word only every second half is moved to where this
// works; the others stay times 16, 256 or 4096, and x is divided by that instead (`spread`), exactly.
// How a row lies: decode/{{ quantization }}.wgsl.
{# bits, zero, scales, as_floats: the type's facts in forward/gguf/quantization.py. #}

{% if as_floats %}
const exponent = 0x4b000000u; // the bits of 2^23
{% if bits == 4 %}
const times_a = vec4(1.0, 256.0, 1.0, 256.0);
const times_b = vec4(16.0, 4096.0, 16.0, 4096.0);

// Eight nibbles less `zero`, as they lie in a word of decode/{{ quantization }}.wgsl.
fn nibbles(word: u32, zero: f32) -> Eight {
    let halves = vec4(word, word, word >> 16u, word >> 16u);
    let a = bitcast<vec4<f32>>((halves & vec4(0x000fu, 0x0f00u, 0x000fu, 0x0f00u)) | vec4(exponent));
    let b = bitcast<vec4<f32>>((halves & vec4(0x00f0u, 0xf000u, 0x00f0u, 0xf000u)) | vec4(exponent));
    return Eight(a - (8388608.0 + zero * times_a), b - (8388608.0 + zero * times_b));
}
{% else %}
const times_a = vec4(1.0, 256.0, 1.0, 256.0);
const times_b = times_a;

// The four bytes of a word, less `zero`.
fn four_bytes(word: u32, zero: f32) -> vec4<f32> {
    let halves = vec4(word, word, word >> 16u, word >> 16u);
    let q = bitcast<vec4<f32>>((halves & vec4(0x00ffu, 0xff00u, 0x00ffu, 0xff00u)) | vec4(exponent));
    return q - (8388608.0 + zero * times_a);
}
{% endif %}

fn spread(v: Eight) -> Eight {
    return Eight(v.a * (1.0 / times_a), v.b * (1.0 / times_b));
}

{% set minimum = scales in ("halves", "six_bits") %}
fn scaled(product: f32, total: f32, scale: vec2<f32>) -> f32 {
    return scale.x * product{{ " - scale.y * total" if minimum }};
}

fn quants8(row: u32, k: u32) -> Eight {
    let base = row * row_words;
{% if bits == 8 %}
    // A signed byte with its sign bit turned is 128 more than it was.
    let at = base + k / 4u;
    return Eight(
        four_bytes(weights[at] ^ 0x80808080u, {{ zero + 128 }}.0),
        four_bytes(weights[at + 1u] ^ 0x80808080u, {{ zero + 128 }}.0),
    );
{% else %}
    let q = weights[base + k / 8u];
{% if bits == 4 %}
    return nibbles(q, {{ zero }}.0);
{% elif bits == 5 %}
    let fifth = weights[base + columns / 8u + k / 32u] >> ((k / 4u) & 6u);
    let a = (q & 0x0f0f0f0fu) | ((fifth & 0x01010101u) << 4u);
    let b = ((q >> 4u) & 0x0f0f0f0fu) | ((fifth & 0x02020202u) << 3u);
    return Eight(four_bytes(a, {{ zero }}.0), four_bytes(b, {{ zero }}.0));
{% elif bits == 6 %}
    let upper = weights[base + columns / 8u + k / 16u] >> ((k / 2u) & 4u);
    let a = (q & 0x0f0f0f0fu) | ((upper & 0x03030303u) << 4u);
    let b = ((q >> 4u) & 0x0f0f0f0fu) | ((upper & 0x0c0c0c0cu) << 2u);
    return Eight(four_bytes(a, {{ zero }}.0), four_bytes(b, {{ zero }}.0));
{% endif %}
{% endif %}
}

fn scale8(row: u32, k: u32) -> vec2<f32> {
    let base = row * row_words + columns / 32u * {{ bits }}u;
{% if scales == "half" %}
    return vec2(unpack2x16float(weights[base + k / 64u] >> ((k / 2u) & 16u)).x, 0.0);
{% elif scales == "halves" %}
    return unpack2x16float(weights[base + k / 32u]) * vec2(1.0, -1.0);
{% elif scales == "six_bits" %}
    let at = base + k / 256u * 5u;
    let s = weights[at + 1u + ((k / 64u) & 3u)] >> ((k / 2u) & 16u);
    return unpack2x16float(weights[at]) * vec2(f32(s & 63u), f32((s >> 8u) & 63u));
{% elif scales == "bytes" %}
    let half = weights[base + columns / 64u + k / 512u] >> ((k / 16u) & 16u);
    let s = extractBits(bitcast<i32>(weights[base + k / 64u]), (k / 2u) & 24u, 8u);
    return vec2(unpack2x16float(half).x * f32(s), 0.0);
{% endif %}
}
{% else %}
{% include "decode/" ~ quantization ~ ".wgsl" %}

// Types whose weights are numbers of their own, or rare: decoded as everywhere else.
fn quants8(row: u32, k: u32) -> Eight {
    return decode8(row, k);
}

fn scale8(row: u32, k: u32) -> f32 {
    return 1.0;
}

fn spread(v: Eight) -> Eight {
    return v;
}

fn scaled(product: f32, total: f32, scale: f32) -> f32 {
    return product;
}
{% endif %}
