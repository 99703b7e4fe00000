{# What the kernels of the gated delta rule share: sizes, where things lie, the gates of a chunk. A workgroup has
   `lanes` lanes, at least as many as a chunk has rows. #}
const chunk = {{ chunk }}u;
const heads = {{ value_heads }}u;
const quads = {{ head_size // 4 }}u; // of a head
const input_stride = {{ (2 * key_heads * head_size + value_heads * head_size + 2 * value_heads) // 4 }}u;
const wide = {{ value_heads * head_size // 4 }}u; // all value heads side by side
const mix_stride = {{ 2 * value_heads * chunk // 4 }}u;
const lanes = {{ lanes }}u;

var<workgroup> gate: array<f32, chunk>;
var<workgroup> beta: array<f32, chunk>;
var<workgroup> cum: array<f32, chunk>; // sum of a chunk's gates up to a row
var<workgroup> rise: array<f32, chunk>; // exp(cum)
var<workgroup> fall: array<f32, chunk>; // exp(cum of the last row − cum)
{% if subgroups is defined %}
var<workgroup> eighths: array<f32, {{ chunk // 8 }}>; // sums of eight gates each
{% endif %}

// Value head h shares the queries and keys of key head h modulo their number.
fn query_at(row: u32, head: u32) -> u32 {
    return row * input_stride + head % {{ key_heads }}u * quads;
}

fn key_at(row: u32, head: u32) -> u32 {
    return row * input_stride + ({{ key_heads }}u + head % {{ key_heads }}u) * quads;
}

fn value_at(row: u32, head: u32) -> u32 {
    return row * input_stride + ({{ 2 * key_heads }}u + head) * quads;
}

fn gate_of(row: u32, index: u32) -> f32 {
    let at = row * input_stride + {{ (2 * key_heads + value_heads) * head_size // 4 }}u;
    return inputs[at + index / 4u][index % 4u];
}

// The gates of the n rows from `first` on; the last chunk's are not needed any more.
fn load_gates(first: u32, n: u32, head: u32, lane: u32) {
    workgroupBarrier();
    if (lane < chunk) {
        gate[lane] = 0.0;
        beta[lane] = 0.0;
        if (lane < n) {
            gate[lane] = gate_of(first + lane, head);
            beta[lane] = gate_of(first + lane, heads + head);
        }
    }
    workgroupBarrier();
{% if subgroups is defined %}
    // One after the other they would take as long as a chunk's products.
    if (lane < chunk / 8u) {
        eighths[lane] = {% for i in range(8) %}{{ " + " if i }}gate[8u * lane + {{ i }}u]{% endfor %};
    }
    workgroupBarrier();
{% endif %}
    if (lane < chunk) {
        var sum = 0.0;
{% if subgroups is defined %}
{% for e in range(chunk // 8) %}
        sum += select(0.0, eighths[{{ e }}], {{ e }}u < lane / 8u);
{% endfor %}
{% for i in range(8) %}
        sum += select(0.0, gate[lane / 8u * 8u + {{ i }}u], {{ i }}u <= lane % 8u);
{% endfor %}
{% else %}
        for (var i = 0u; i <= lane; i += 1u) {
            sum += gate[i];
        }
{% endif %}
        cum[lane] = sum;
        rise[lane] = exp(sum);
    }
    workgroupBarrier();
    if (lane < chunk) {
        fall[lane] = exp(cum[n - 1u] - cum[lane]);
    }
    workgroupBarrier();
}
{% if triangular is defined %}

// Tile number t of those on and below the diagonal, row by row: its row and column.
fn lower_tile(t: u32) -> vec2<u32> {
    // A root may be short of a whole number by some ulp; the next smaller one is short by 0.06 at least.
    let i = u32((sqrt(f32(8u * t + 1u)) - 1.0) * 0.5 + 0.001);
    return vec2(i, t - i * (i + 1u) / 2u);
}
{% endif %}
{# The first row and the end of the example that a row belongs to. #}
{% macro bounds_of(row) -%}
{{ "vec2<u32>(0u, extent.rows)" if text else "segments[" ~ row ~ "]" }}
{%- endmacro %}
{# A walk of a workgroup over the chunks that begin in its block of rows; `call()` has first and n, end of the example. #}
{% macro each_chunk() %}
    let block_end = min((block + 1u) * chunk, extent.rows);
    var row = block * chunk;
    while (row < block_end) {
        let bounds = {{ bounds_of("row") }};
        let end = min(bounds.y, extent.rows);
        let past = (row - bounds.x) % chunk;
        if (past != 0u) {
            row = min(row + chunk - past, end);
            continue;
        }
        let first = row;
        let start = bounds.x;
        let n = min(chunk, end - first);
        row += n;
{{ caller() }}
    }
{% endmacro %}
