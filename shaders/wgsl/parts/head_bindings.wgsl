{# The bindings of head_norm_rope.wgsl and its backward, of which `output` is the one that is written. #}
struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<vec4<{{ x_type }}>>;
@group(0) @binding(2) var<storage, read> q_weight: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> k_weight: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read_write> {{ output }}: array<vec4<{{ out_type }}>>;
{% if half > 0 %}
@group(0) @binding(5) var<storage, read> positions: array<u32>;
@group(0) @binding(6) var<storage, read> tables: array<vec4<f32>>;
{% endif %}
