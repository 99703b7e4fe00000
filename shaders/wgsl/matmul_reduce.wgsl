// out[m, n] = epilogue(Σ_s partial[s, m, n]), the second pass of a matmul whose contraction was cut
// into {{ splits }} stretches. Bindings: partial [splits, maximum rows, n_columns], out [rows, out_stride],
// residual [rows, out_stride], bias [out_stride]{{ ", scales [out_stride], kept [rows, out_stride]" if scaled }}. One lane four columns; the stretches are added in order.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> partial: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> out: array<vec4<{{ out_type }}>>;
{% set next = 3 %}
{% if epilogue == "residual" %}
@group(0) @binding({{ next }}) var<storage, read> residual: array<vec4<f32>>;
{% set next = next + 1 %}
{% endif %}
{% if bias %}
@group(0) @binding({{ next }}) var<storage, read> bias: array<vec4<f32>>;
{% set next = next + 1 %}
{% endif %}
{% if scaled %}
@group(0) @binding({{ next }}) var<storage, read> scales: array<vec4<f32>>;
@group(0) @binding({{ next + 1 }}) var<storage, read_write> kept: array<vec4<{{ scaled.kept_type }}>>;
{% set next = next + 2 %}
{% endif %}
{% if placed %}
struct Place { x_column: u32, out_column: u32 }
@group(0) @binding({{ next }}) var<uniform> place: Place;
{% endif %}

const quads = {{ n_columns // 4 }}u;

{% include "parts/matmul_epilogue.wgsl" %}

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = (group.x + group.y * groups.x) * 64u + lane;
    let row = index / quads;
    if (row >= extent.rows) { return; }
    var sum = partial[index];
{% for s in range(1, splits) %}
    sum += partial[index + {{ s * maximum_rows }}u * quads];
{% endfor %}
    let quad = {{ "place.out_column / 4u + " if placed }}index % quads;
    write_out(row * {{ out_stride // 4 }}u + quad, quad, sum);
}
