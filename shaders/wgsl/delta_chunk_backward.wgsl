// What is left of the gradient of the gated delta rule once delta_walk_backward.wgsl has d_v' and G, the gradients to v'
// and to the state that a chunk leaves; S is the state at its start, S⁺ that at its end:
//   R = d_o Sᵀ,  Y = v' Gᵀ,  d_W = −d_v' Sᵀ;   b_u = Tᵀ d_v',  b_w = Tᵀ d_W
//   M = −strict lower part of (b_u Uᵀ + b_w Wᵀ) · D,   E = lower part of (d_o v'ᵀ) · D
//   d_q = E k + exp(cum) R;   H = M k + exp(cum) b_w,   F = Eᵀ q + Mᵀ (beta k) + exp(cum[last] − cum) Y
//   d_k = beta H + F;   d_v = beta b_u;   d_beta = b_u·v + k·H
//   d_cum = q·d_q + k·(beta H − F), of the last row + ⟨G, S⁺⟩;   d_g = the sum of d_cum from a row on
// M is dA · D with A as in delta_prepare.wgsl. The sums over i and j of dP · P and dA · A, which d_cum has, are the
// products with q and k above.
//
// Bindings: inputs, segments, deltas, states, d_states as before; mixes (T and P, which become M and E), d_deltas: d_o, d_v',
// then R which becomes d_q, Y which becomes F and d_k, d_W, b_u which becomes d_v, b_w which becomes H; d_gates
// [rows, 2 · heads] (d_g, d_beta). One workgroup a block of rows and value head, for the chunks that begin there.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> inputs: array<vec4<f32>>;
@group(0) @binding(2) var<storage, read_write> mixes: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read> deltas: array<vec4<f32>>;
@group(0) @binding(4) var<storage, read> segments: array<vec2<u32>>;
@group(0) @binding(5) var<storage, read_write> d_deltas: array<vec4<f32>>;
@group(0) @binding(6) var<storage, read> states: array<vec4<f32>>;
@group(0) @binding(7) var<storage, read> d_states: array<vec4<f32>>;
@group(0) @binding(8) var<storage, read_write> d_gates: array<f32>;

{% set triangular = true %}
{% import "parts/delta.wgsl" as delta with context %}
{% include "parts/delta.wgsl" %}
var<workgroup> sums: array<f32, lanes>;
var<workgroup> d_cum: array<f32, chunk>;

// Where a row's part `which` of d_deltas lies: d_o 0, d_v' 1, R 2, Y 3, d_W 4, b_u 5, b_w 6.
fn d_at(row: u32, which: u32, head: u32) -> u32 {
    return (row * 7u + which) * wide + head * quads;
}

// Of deltas: o 0, v' 1, U 2, W 3.
fn delta_at(row: u32, which: u32, head: u32) -> u32 {
    return (row * 4u + which) * wide + head * quads;
}

@compute @workgroup_size({{ lanes }})
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x + group.y * groups.x;
    let block = index / heads;
    let head = index % heads;
    if (block * chunk >= extent.rows) { return; }
{% call delta.each_chunk() %}
        load_gates(first, n, head, lane);
        let across = (n + 3u) / 4u;
        let has_before = first > start;
        let has_after = first + chunk < end;
        let before = (first / chunk * heads + head) * 4u * quads * quads;
        let after = ((first + chunk) / chunk * heads + head) * 4u * quads * quads;

        // R, Y and d_W: rows times rows of S or G.
        for (var tile = lane; tile < across * quads; tile += lanes) {
            let i0 = tile / quads * 4u;
            let a = tile % quads;
{% for r in range(4) %}
            let row{{ r }} = first + min(i0 + {{ r }}u, n - 1u);
            let d_o_at{{ r }} = d_at(row{{ r }}, 0u, head);
            let d_v_at{{ r }} = d_at(row{{ r }}, 1u, head);
            let v_at{{ r }} = delta_at(row{{ r }}, 1u, head);
            var r{{ r }} = vec4<f32>();
            var y{{ r }} = vec4<f32>();
            var w{{ r }} = vec4<f32>();
{% endfor %}
            if (has_before) {
                for (var x = 0u; x < quads; x += 1u) {
{% for s in range(4) %}
                    let s{{ s }} = states[before + (4u * a + {{ s }}u) * quads + x];
{% endfor %}
{% for r in range(4) %}
                    let d_o{{ r }} = d_deltas[d_o_at{{ r }} + x];
                    r{{ r }} += vec4(dot(d_o{{ r }}, s0), dot(d_o{{ r }}, s1), dot(d_o{{ r }}, s2), dot(d_o{{ r }}, s3));
                    let d_v{{ r }} = d_deltas[d_v_at{{ r }} + x];
                    w{{ r }} -= vec4(dot(d_v{{ r }}, s0), dot(d_v{{ r }}, s1), dot(d_v{{ r }}, s2), dot(d_v{{ r }}, s3));
{% endfor %}
                }
            }
            if (has_after) {
                for (var x = 0u; x < quads; x += 1u) {
{% for s in range(4) %}
                    let g{{ s }} = d_states[after + (4u * a + {{ s }}u) * quads + x];
{% endfor %}
{% for r in range(4) %}
                    let v{{ r }} = deltas[v_at{{ r }} + x];
                    y{{ r }} += vec4(dot(v{{ r }}, g0), dot(v{{ r }}, g1), dot(v{{ r }}, g2), dot(v{{ r }}, g3));
{% endfor %}
                }
            }
{% for r in range(4) %}
            if (i0 + {{ r }}u < n) {
                d_deltas[d_at(row{{ r }}, 2u, head) + a] = r{{ r }};
                d_deltas[d_at(row{{ r }}, 3u, head) + a] = y{{ r }};
                d_deltas[d_at(row{{ r }}, 4u, head) + a] = w{{ r }};
            }
{% endfor %}
        }
        var inner = vec4<f32>();
        if (has_after) {
            for (var at = lane; at < 4u * quads * quads; at += lanes) {
                inner += states[after + at] * d_states[after + at];
            }
        }
        sums[lane] = dot(inner, vec4(1.0));
        workgroupBarrier();
        storageBarrier();

        // b_u and b_w: columns of T times rows.
        for (var tile = lane; tile < across * quads; tile += lanes) {
            let i0 = tile / quads * 4u;
            let a = tile % quads;
{% for r in range(4) %}
            var u{{ r }} = vec4<f32>();
            var w{{ r }} = vec4<f32>();
{% endfor %}
            for (var t = i0; t < n; t += 1u) {
                let mix = mixes[(first + t) * mix_stride + head * (chunk / 4u) + i0 / 4u];
                let d_v = d_deltas[d_at(first + t, 1u, head) + a];
                let d_w = d_deltas[d_at(first + t, 4u, head) + a];
{% for r in range(4) %}
                u{{ r }} += mix[{{ r }}] * d_v;
                w{{ r }} += mix[{{ r }}] * d_w;
{% endfor %}
            }
{% for r in range(4) %}
            if (i0 + {{ r }}u < n) {
                d_deltas[d_at(first + i0 + {{ r }}u, 5u, head) + a] = u{{ r }};
                d_deltas[d_at(first + i0 + {{ r }}u, 6u, head) + a] = w{{ r }};
            }
{% endfor %}
        }
        workgroupBarrier();
        storageBarrier();

        // M and E: rows times rows.
        for (var tile = lane; tile < across * (across + 1u) / 2u; tile += lanes) {
            let place = lower_tile(tile) * 4u;
            let i0 = place.x;
            let j0 = place.y;
{% for r in range(4) %}
            let row{{ r }} = first + min(i0 + {{ r }}u, n - 1u);
            let d_o_at{{ r }} = d_at(row{{ r }}, 0u, head);
            let b_u_at{{ r }} = d_at(row{{ r }}, 5u, head);
            let b_w_at{{ r }} = d_at(row{{ r }}, 6u, head);
            let other{{ r }} = delta_at(first + min(j0 + {{ r }}u, n - 1u), 0u, head);
            var m{{ r }} = vec4<f32>();
            var e{{ r }} = vec4<f32>();
{% endfor %}
            for (var x = 0u; x < quads; x += 1u) {
{% for s in range(4) %}
                let v{{ s }} = deltas[other{{ s }} + wide + x];
                let u{{ s }} = deltas[other{{ s }} + 2u * wide + x];
                let w{{ s }} = deltas[other{{ s }} + 3u * wide + x];
{% endfor %}
{% for r in range(4) %}
                let d_o{{ r }} = d_deltas[d_o_at{{ r }} + x];
                e{{ r }} += vec4(dot(d_o{{ r }}, v0), dot(d_o{{ r }}, v1), dot(d_o{{ r }}, v2), dot(d_o{{ r }}, v3));
                let b_u{{ r }} = d_deltas[b_u_at{{ r }} + x];
                m{{ r }} -= vec4(dot(b_u{{ r }}, u0), dot(b_u{{ r }}, u1), dot(b_u{{ r }}, u2), dot(b_u{{ r }}, u3));
                let b_w{{ r }} = d_deltas[b_w_at{{ r }} + x];
                m{{ r }} -= vec4(dot(b_w{{ r }}, w0), dot(b_w{{ r }}, w1), dot(b_w{{ r }}, w2), dot(b_w{{ r }}, w3));
{% endfor %}
            }
            let js = vec4(j0) + vec4(0u, 1u, 2u, 3u);
            let cums = vec4(cum[j0], cum[j0 + 1u], cum[j0 + 2u], cum[j0 + 3u]);
{% for r in range(4) %}
            if (i0 + {{ r }}u < n) {
                let i = i0 + {{ r }}u;
                let decay = exp(min(vec4(cum[i]) - cums, vec4<f32>()));
                let at = (first + i) * mix_stride + head * (chunk / 4u) + j0 / 4u;
                mixes[at] = select(vec4<f32>(), decay * m{{ r }}, js < vec4(i));
                mixes[at + heads * (chunk / 4u)] = select(vec4<f32>(), decay * e{{ r }}, js <= vec4(i));
            }
{% endfor %}
        }
        workgroupBarrier();
        storageBarrier();

        // d_q, H and F.
        for (var tile = lane; tile < across * quads; tile += lanes) {
            let i0 = tile / quads * 4u;
            let a = tile % quads;
{% for r in range(4) %}
            var d_q{{ r }} = vec4<f32>();
            var h{{ r }} = vec4<f32>();
            var f{{ r }} = vec4<f32>();
            let mix{{ r }} = (first + min(i0 + {{ r }}u, n - 1u)) * mix_stride + head * (chunk / 4u);
{% endfor %}
            for (var j = 0u; j <= i0 / 4u; j += 1u) {
{% for s in range(4) %}
                let k{{ s }} = inputs[key_at(first + min(4u * j + {{ s }}u, n - 1u), head) + a];
{% endfor %}
{% for r in range(4) %}
                let m{{ r }} = mixes[mix{{ r }} + j];
                h{{ r }} += m{{ r }}.x * k0 + m{{ r }}.y * k1 + m{{ r }}.z * k2 + m{{ r }}.w * k3;
                let e{{ r }} = mixes[mix{{ r }} + heads * (chunk / 4u) + j];
                d_q{{ r }} += e{{ r }}.x * k0 + e{{ r }}.y * k1 + e{{ r }}.z * k2 + e{{ r }}.w * k3;
{% endfor %}
            }
            for (var t = i0; t < n; t += 1u) {
                let at = (first + t) * mix_stride + head * (chunk / 4u) + i0 / 4u;
                let m = mixes[at];
                let e = mixes[at + heads * (chunk / 4u)];
                let q = inputs[query_at(first + t, head) + a];
                let k = inputs[key_at(first + t, head) + a] * beta[t];
{% for r in range(4) %}
                f{{ r }} += e[{{ r }}] * q + m[{{ r }}] * k;
{% endfor %}
            }
{% for r in range(4) %}
            if (i0 + {{ r }}u < n) {
                let i = i0 + {{ r }}u;
                let own = d_at(first + i, 0u, head) + a;
                d_deltas[own + 2u * wide] = d_q{{ r }} + rise[i] * d_deltas[own + 2u * wide];
                d_deltas[own + 3u * wide] = f{{ r }} + fall[i] * d_deltas[own + 3u * wide];
                d_deltas[own + 6u * wide] = h{{ r }} + rise[i] * d_deltas[own + 6u * wide];
            }
{% endfor %}
        }
        workgroupBarrier();
        storageBarrier();

        if (lane < n) {
            let own = d_at(first + lane, 0u, head);
            let query = query_at(first + lane, head);
            let key = key_at(first + lane, head);
            let value = value_at(first + lane, head);
            var of_query = vec4<f32>();
            var of_h = vec4<f32>();
            var of_f = vec4<f32>();
            var of_value = vec4<f32>();
            for (var x = 0u; x < quads; x += 1u) {
                let k = inputs[key + x];
                of_query += inputs[query + x] * d_deltas[own + 2u * wide + x];
                of_f += k * d_deltas[own + 3u * wide + x];
                of_h += k * d_deltas[own + 6u * wide + x];
                of_value += inputs[value + x] * d_deltas[own + 5u * wide + x];
            }
            let kh = dot(of_h, vec4(1.0));
            var d = dot(of_query, vec4(1.0)) + beta[lane] * kh - dot(of_f, vec4(1.0));
            if (lane == n - 1u) {
                for (var i = 0u; i < lanes; i += 1u) {
                    d += sums[i];
                }
            }
            d_cum[lane] = d;
            d_gates[(first + lane) * 2u * heads + heads + head] = kh + dot(of_value, vec4(1.0));
        }
        workgroupBarrier();
        if (lane < n) {
            var d = 0.0;
            for (var i = lane; i < n; i += 1u) {
                d += d_cum[i];
            }
            d_gates[(first + lane) * 2u * heads + head] = d;
        }
        for (var at = lane; at < n * quads; at += lanes) {
            let i = at / quads;
            let own = d_at(first + i, 0u, head) + at % quads;
            d_deltas[own + 3u * wide] += beta[i] * d_deltas[own + 6u * wide];
            d_deltas[own + 5u * wide] *= beta[i];
        }
{% endcall %}
}
