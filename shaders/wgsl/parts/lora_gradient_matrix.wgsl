{# The gradients of lora_gradient_matrix.wgsl: workgroup `tile_index` of a slice. Who includes this declares `lanes`,
   `tiles`, pack_eight, the bindings and, with dropout, what parts/dropout.wgsl asks for. #}
{% from "parts/fragments.wgsl" import left_type, right_type, result_type with context %}
{% set subgroups = long // n %}
{% set lanes = subgroups * subgroup_lanes %}
{% set long_step = long // 8 + 1 %}
{% set most_short = [parts[0].short, parts[1].short] | max %}
{% set most_width = (most_short + n - 1) // n * n %}
{% set short_at = depth * long_step %}
{% set stage_size = subgroups * m * n // 4 %}
{% set stage_turns = (stage_size + lanes - 1) // lanes %}
{% set long_units = depth * long // 8 %}
{% set long_turns = (long_units + lanes - 1) // lanes %}
{% set held = m * n // subgroup_lanes %}
// |number| of the shorter side's rows, as bits, in turns; then of the longer side's.
var<workgroup> largest: array<atomic<u32>, 4>;

fn largest_of(a: vec4<f32>, b: vec4<f32>) -> u32 {
    let bits = max(bitcast<vec4<u32>>(abs(a)), bitcast<vec4<u32>>(abs(b))); // in the order of numbers, NaN last
    return max(max(bits.x, bits.y), max(bits.z, bits.w));
}

// The exponent's bits of the power of two that takes a number to 2^13 … 2^14; of 1 for what isn't finite.
fn exponent_for(bits: u32) -> u32 {
    let exponent = bits >> 23u;
    if (exponent == 255u) { return 127u; }
    return min(267u - exponent, 227u);
}

{% if d_y_copied %}
{% from "parts/row_power.wgsl" import row_exponent %}
// What makes a row of d_y of its copy.
fn row_back(largest_bits: u32) -> f32 {
    return bitcast<f32>(u32(127 - {{ row_exponent("largest_bits") }}) << 23u);
}

{% endif %}
{# Of the lanes of a subgroup one goes on: of 256 on one number each would wait for all before. #}
{% macro note_largest(at, bits) %}
{% if emulated %}
atomicMax(&largest[{{ at }}], {{ bits }});
{%- else %}
{
                    let most = subgroupMax({{ bits }});
                    if (subgroupElect()) { atomicMax(&largest[{{ at }}], most); }
                }
{%- endif %}
{% endmacro %}
{% if p_type and parts[1].eights %}
fn four_of(words: vec2<u32>) -> vec4<f32> { return vec4(unpack2x16float(words.x), unpack2x16float(words.y)); }

{% endif %}
fn add_to_gradient(slice: u32, at: u32, value: vec4<f32>) {
{% for s in range(n_slices) %}
    if (slice == {{ s }}u) { gradient_{{ s }}[at] += value; }
{% endfor %}
}

fn add_gradients(tile_index: u32, slice: u32, lane: u32, team: u32) {
{% if emulated %}
    let team_lane = lane % {{ subgroup_lanes }}u;
{% endif %}
    if (lane == 0u) { // workgroup memory begins as anything: kernels run without the zeros that WebGPU gives
        atomicStore(&largest[0], 0u);
        atomicStore(&largest[1], 0u);
        atomicStore(&largest[2], 0u);
        atomicStore(&largest[3], 0u);
    }
    let stretch = (extent.rows + {{ n_slices - 1 }}u) / {{ n_slices }}u;
    let first = slice * stretch;
    let last = min(first + stretch, extent.rows);
    let last_row = max(last, 1u) - 1u;
{% for part in parts %}
{% set of_b = loop.index0 %}
{% set width = (part.short + n - 1) // n * n %}
{% set short_step = width // 8 + 1 %}
{% set scaled = part.long_type == "f32" %}
{% set masked = dropout and not of_b %}
{% set columned = p_type and of_b %}
{% set copied = d_y_copied and of_b %}
{# Lanes that are whole lines of the longer side keep to their columns, and so to the keys of these. #}
{% set key_turns = 1 if lanes % (long // 8) == 0 else long_turns %}
{% set short_units = depth * width // 8 %}
{% set short_turns = (short_units + lanes - 1) // lanes %}
{# Fragments of the result lie with the gradient: of d_A along the longer side, of d_B across it. #}
{% set fragments = width // (n if of_b else m) %}
    {{ "if (tile_index < %du) {" % part.n_groups if loop.first else "} else {" }}
        let tile = {{ "tile_index" if loop.first else "tile_index - %du" % parts[0].n_groups }};
        var begin = tile * {{ long }}u; // along the longer side
        var end = {{ part.members[0].stop }}u;
        var long_column = begin + {{ part.members[0].shift }}u;
        var short_column = {{ part.members[0].short_column }}u;
{% if masked %}
        var member = 0u;
{% endif %}
{% for one in part.members[1:] %}
        if (tile >= {{ one.first_group }}u) {
            begin = {{ one.start }}u + (tile - {{ one.first_group }}u) * {{ long }}u;
            end = {{ one.stop }}u;
            long_column = begin + {{ one.shift }}u;
            short_column = {{ one.short_column }}u;
{% if masked %}
            member = {{ loop.index }}u;
{% endif %}
        }
{% endfor %}
{% for u in range(key_turns if masked else 0) %}
        let key_at_{{ u }} = begin / 8u + (lane + {{ u * lanes }}u) % {{ long // 8 }}u;
{% if part.eights %}
        let key_{{ u }} = eight_key(matrix_keys[member], key_at_{{ u }});
{% else %}
        let key_a_{{ u }} = quad_key(matrix_keys[member], 2u * key_at_{{ u }});
        let key_b_{{ u }} = quad_key(matrix_keys[member], 2u * key_at_{{ u }} + 1u);
{% endif %}
{% endfor %}
{% for u in range(long_turns) %}
{% if part.eights %}
        var fetched_{{ u }} = vec4<u32>();
{% else %}
        var long_a_{{ u }} = vec4<{{ part.long_type }}>();
        var long_b_{{ u }} = vec4<{{ part.long_type }}>();
{% endif %}
{% if columned and part.eights %}
        var p_{{ u }} = vec4<u32>();
{% elif columned %}
        var p_a_{{ u }} = vec4<{{ p_type }}>();
        var p_b_{{ u }} = vec4<{{ p_type }}>();
{% endif %}
{% if masked %}
        var row_key_{{ u }} = 0u;
{% endif %}
{% endfor %}
{% for u in range(short_turns) %}
        var short_a_{{ u }} = vec4<f32>();
        var short_b_{{ u }} = vec4<f32>();
{% if copied %}
        var size_{{ u }} = 0u;
{% endif %}
{% endfor %}
{% if columned %}
        // Of d_y · p, in the columns that a lane fetches in all its turns.
        var magnitudes_a = vec4<f32>();
        var magnitudes_b = vec4<f32>();
        // What the end multiplies by, asked for in time.
{% for u in range(stage_turns) %}
        let column_scale_{{ u }} = scales[long_column + min((lane + {{ u * lanes }}u) / {{ n // 4 }}u, end - begin - 1u)];
{% endfor %}
        let own_inverses = inverses[long_column / 4u + min(lane, (end - begin) / 4u - 1u)];
{% endif %}
{% if emulated %}
        var sums = array<f32, {{ fragments * held }}>();
{% else %}
{% for f in range(fragments) %}
        var sum_{{ f }} = {{ result_type }}();
{% endfor %}
{% endif %}
{# Loads all of a tile, none behind a branch or a conversion: each would wait for the one before. What lies outside is
   read inside, and counts for nothing (`convert`, and what is stored). #}
{% macro fetch(start) %}
{% for u in range(long_turns) %}
        {
            let unit = lane + {{ u * lanes }}u;
            let row = min({{ start }} + unit / {{ long // 8 }}u, last_row);
            let at = unit % {{ long // 8 }}u * 8u;
{% if part.eights %}
            let eight = (row * {{ part.long_stride }}u + long_column + min(at, end - begin - 8u)) / 8u;
            fetched_{{ u }} = {{ part.long_name }}[eight];
{% if columned %}
            p_{{ u }} = p[eight];
{% endif %}
{% else %}
            let quad = (row * {{ part.long_stride }}u + long_column + min(at, end - begin - 4u)) / 4u;
            let next = (row * {{ part.long_stride }}u + long_column + min(at + 4u, end - begin - 4u)) / 4u;
            long_a_{{ u }} = {{ part.long_name }}[quad];
            long_b_{{ u }} = {{ part.long_name }}[next];
{% endif %}
{% if columned and not part.eights %}
            p_a_{{ u }} = p[quad];
            p_b_{{ u }} = p[next];
{% endif %}
{% if masked %}
            row_key_{{ u }} = row_keys[row];
{% endif %}
        }
{% endfor %}
{% for u in range(short_turns) %}
        {
            let unit = min(lane + {{ u * lanes }}u, {{ short_units - 1 }}u);
            let row = min({{ start }} + unit / {{ width // 8 }}u, last_row);
            let at = unit % {{ width // 8 }}u * 8u;
            let quad = (row * {{ part.short_stride }}u + short_column) / 4u;
            short_a_{{ u }} = {{ part.short_name }}[quad + min(at, {{ part.short - 4 }}u) / 4u];
            short_b_{{ u }} = {{ part.short_name }}[quad + min(at + 4u, {{ part.short - 4 }}u) / 4u];
{% if copied %}
            size_{{ u }} = d_y_largest[row];
{% endif %}
        }
{% endfor %}
{% endmacro %}
{# Makes of what was loaded, from row `begun` on, what the tiles take. Rows past the stretch are zero on the shorter side. #}
{% macro convert() %}
{% for u in range(long_turns if part.eights and masked else 0) %}
            fetched_{{ u }} = eight_after_dropout(fetched_{{ u }}, row_key_{{ u }}, key_{{ u % key_turns }});
{% endfor %}
{% for u in range(long_turns if part.eights and columned else 0) %}
            {
                let used = vec4<bool>(begun + (lane + {{ u * lanes }}u) / {{ long // 8 }}u < last);
                magnitudes_a += select(vec4<f32>(), four_of(fetched_{{ u }}.xy) * four_of(p_{{ u }}.xy), used);
                magnitudes_b += select(vec4<f32>(), four_of(fetched_{{ u }}.zw) * four_of(p_{{ u }}.zw), used);
            }
{% endfor %}
{% for u in range(long_turns if not part.eights else 0) %}
{% if columned %}
            {
                let used = vec4<bool>(begun + (lane + {{ u * lanes }}u) / {{ long // 8 }}u < last);
                magnitudes_a += select(vec4<f32>(), vec4<f32>(long_a_{{ u }}) * vec4<f32>(p_a_{{ u }}), used);
                magnitudes_b += select(vec4<f32>(), vec4<f32>(long_b_{{ u }}) * vec4<f32>(p_b_{{ u }}), used);
            }
{% endif %}
            var part_a_{{ u }} = vec4<f32>(long_a_{{ u }});
            var part_b_{{ u }} = vec4<f32>(long_b_{{ u }});
{% if masked %}
            part_a_{{ u }} = after_dropout(part_a_{{ u }}, row_key_{{ u }}, key_a_{{ u % key_turns }});
            part_b_{{ u }} = after_dropout(part_b_{{ u }}, row_key_{{ u }}, key_b_{{ u % key_turns }});
{% endif %}
{% endfor %}
{% for u in range(short_turns) %}
            {
                let unit = lane + {{ u * lanes }}u;
                let at = unit % {{ width // 8 }}u * 8u;
                let used = unit < {{ short_units }}u && begun + unit / {{ width // 8 }}u < last;
{% if copied %}
                let power = row_back(size_{{ u }});
                short_a_{{ u }} *= power;
                short_b_{{ u }} *= power;
{% endif %}
                short_a_{{ u }} = select(vec4<f32>(), short_a_{{ u }}, used && at < {{ part.short }}u);
                short_b_{{ u }} = select(vec4<f32>(), short_b_{{ u }}, used && at + 4u < {{ part.short }}u);
            }
{% endfor %}
{% endmacro %}
        var exponent = {{ "354u" if scaled else "227u" }}; // of what the sums are scaled by{{ ", and 127" if scaled }}
        var turn = 0u;
        {{ fetch("first") }}
        workgroupBarrier(); // behind it `largest` begins
        for (var begun = first; begun < last; begun += {{ depth }}u) {
{{ convert() }}
            {
                var bits = 0u;
{% for u in range(short_turns) %}
                bits = max(bits, largest_of(short_a_{{ u }}, short_b_{{ u }}));
{% endfor %}
                {{ note_largest("turn", "bits") }}
{% if scaled %}
                var long_bits = 0u;
{% for u in range(long_turns) %}
                long_bits = max(long_bits, largest_of(part_a_{{ u }}, part_b_{{ u }}));
{% endfor %}
                {{ note_largest("2u + turn", "long_bits") }}
{% endif %}
            }
            // Behind this barrier the tiles are free, too.
{% if emulated %}
            workgroupBarrier();
            let bits = atomicLoad(&largest[turn]);
{% else %}
            let bits = workgroupUniformLoad(&largest[turn]); // the same for all, which fragments need
{% endif %}
{% if scaled %}
{% if emulated %}
            let long_exponent = exponent_for(atomicLoad(&largest[2u + turn]));
{% else %}
            let long_exponent = exponent_for(workgroupUniformLoad(&largest[2u + turn]));
{% endif %}
            let long_factor = bitcast<f32>(long_exponent << 23u);
            let now = min(exponent, exponent_for(bits) + long_exponent);
            let factor = bitcast<f32>((max(now, long_exponent) - long_exponent) << 23u);
{% else %}
            let now = min(exponent, exponent_for(bits));
            let factor = bitcast<f32>(now << 23u);
{% endif %}
            let shrink = bitcast<f32>((127u - min(exponent - now, 127u)) << 23u);
            exponent = now;
            turn = 1u - turn;
            if (lane == 0u) { atomicStore(&largest[turn], 0u); }
{% if scaled %}
            if (lane == 0u) { atomicStore(&largest[2u + turn], 0u); }
{% endif %}
{% for u in range(long_turns) %}
{% if (u + 1) * lanes > long_units %}
            if (lane < {{ long_units - u * lanes }}u)
{% endif %}
            {
                let unit = lane + {{ u * lanes }}u;
                tiles[unit / {{ long // 8 }}u * {{ long_step }}u + unit % {{ long // 8 }}u] = {{ "packed(long_factor * part_a_%d, long_factor * part_b_%d)" % (u, u) if scaled else "fetched_%d" % u if part.eights else "packed(part_a_%d, part_b_%d)" % (u, u) }};
            }
{% endfor %}
{% for u in range(short_turns) %}
{% if (u + 1) * lanes > short_units %}
            if (lane < {{ short_units - u * lanes }}u)
{% endif %}
            {
                let unit = lane + {{ u * lanes }}u;
                tiles[{{ short_at }}u + unit / {{ width // 8 }}u * {{ short_step }}u + unit % {{ width // 8 }}u] = packed(factor * short_a_{{ u }}, factor * short_b_{{ u }});
            }
{% endfor %}
            workgroupBarrier();
            {{ fetch("(begun + %du)" % depth) }}
{% if emulated %}
            for (var at = 0u; at < {{ fragments * held }}u; at++) {
                let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
                let fragment = at / {{ held }}u;
{% if of_b %}
                let along = team * {{ m }}u + place / {{ n }}u;
                let across = fragment * {{ n }}u + place % {{ n }}u;
{% else %}
                let along = team * {{ n }}u + place % {{ n }}u;
                let across = fragment * {{ m }}u + place / {{ n }}u;
{% endif %}
                sums[at] *= shrink;
                for (var i = 0u; i < {{ depth }}u; i++) {
                    let a = number(tiles[i * {{ long_step }}u + along / 8u], along);
                    sums[at] += a * number(tiles[{{ short_at }}u + i * {{ short_step }}u + across / 8u], across);
                }
            }
{% else %}
{% for f in range(fragments) %}
            sum_{{ f }} = subgroupMatrixScalarMultiply(sum_{{ f }}, shrink);
{% endfor %}
{% for step in range(depth // k) %}
            {
{% if of_b %}
                let left = subgroupMatrixLoad<{{ left_type }}, col_major>(&tiles, {{ step * k * long_step }}u + team * {{ m // 8 }}u, {{ long_step }}u);
{% for f in range(fragments) %}
                let right_{{ f }} = subgroupMatrixLoad<{{ right_type }}, row_major>(&tiles, {{ short_at + step * k * short_step + f * n // 8 }}u, {{ short_step }}u);
                sum_{{ f }} = subgroupMatrixMultiplyAccumulate(left, right_{{ f }}, sum_{{ f }});
{% endfor %}
{% else %}
                let right = subgroupMatrixLoad<{{ right_type }}, row_major>(&tiles, {{ step * k * long_step }}u + team * {{ n // 8 }}u, {{ long_step }}u);
{% for f in range(fragments) %}
                let left_{{ f }} = subgroupMatrixLoad<{{ left_type }}, col_major>(&tiles, {{ short_at + step * k * short_step + f * m // 8 }}u, {{ short_step }}u);
                sum_{{ f }} = subgroupMatrixMultiplyAccumulate(left_{{ f }}, right, sum_{{ f }});
{% endfor %}
{% endif %}
            }
{% endfor %}
{% endif %}
        }
{% if scaled %}
        // In two steps, each of which is a number.
        let half = exponent / 2u;
        let back = {{ part.scale }} * bitcast<f32>((254u - half) << 23u);
        let rest = bitcast<f32>((254u - (exponent - half)) << 23u);
{% else %}
        let back = {{ part.scale }} * bitcast<f32>((254u - exponent) << 23u);
{% endif %}
{% set back = "back * (rest * bitcast<vec4<f32>>(tiles[unit]))" if scaled else "back * bitcast<vec4<f32>>(tiles[unit])" %}
{% macro store(fragment) %}
{% for u in range(stage_turns) %}
            {{ "if (lane < %du) " % (stage_size - u * lanes) if (u + 1) * lanes > stage_size }}{
                let unit = lane + {{ u * lanes }}u;
                let owner = unit / {{ m * n // 4 }}u;
                let row = unit % {{ m * n // 4 }}u * 4u / {{ n }}u;
                let column = unit % {{ m * n // 4 }}u * 4u % {{ n }}u;
{% if of_b %}
                let i = begin + owner * {{ m }}u + row;
                let j = {{ fragment }} * {{ n }}u + column;
                if (i < end && j < {{ part.short }}u) {
                    add_to_gradient(slice, {{ part.start }}u + (i * {{ part.short }}u + j) / 4u, {{ "column_scale_%d * " % u if columned }}{{ back }});
                }
{% else %}
                let i = {{ fragment }} * {{ m }}u + row;
                let j = begin + owner * {{ n }}u + column;
                if (i < {{ part.short }}u && j < end) {
                    add_to_gradient(slice, {{ part.start }}u + ({{ "(short_column + i)" if masked else "i" }} * {{ part.n_long }}u + j) / 4u, {{ back }});
                }
{% endif %}
            }
{% endfor %}
{% endmacro %}
{# What the columns' lanes have of the magnitudes, behind the fragments; then their sums. #}
{% macro put_magnitudes() %}
        tiles[{{ stage_size }}u + 2u * lane] = bitcast<vec4<u32>>(magnitudes_a);
        tiles[{{ stage_size }}u + 2u * lane + 1u] = bitcast<vec4<u32>>(magnitudes_b);
{% endmacro %}
{% macro add_magnitudes() %}
            if (lane < {{ long // 4 }}u && 4u * lane < end - begin) {
                var sum = vec4<f32>();
{% for line in range(0, 2 * lanes, long // 4) %}
                sum += bitcast<vec4<f32>>(tiles[{{ stage_size + line }}u + lane]);
{% endfor %}
                add_to_gradient(slice, {{ part.magnitudes }}u + begin / 4u + lane, own_inverses * sum);
            }
{% endmacro %}
{% if emulated %}
        for (var f = 0u; f < {{ fragments }}u; f++) {
            workgroupBarrier();
            for (var at = 0u; at < {{ held }}u; at++) {
                let place = at * {{ subgroup_lanes }}u + team_lane;
                tiles[team * {{ m * n // 4 }}u + place / 4u][place % 4u] = bitcast<u32>(sums[f * {{ held }}u + at]);
            }
            workgroupBarrier();
{{ store("f") }}
        }
{% if columned %}
        workgroupBarrier();
{{ put_magnitudes() }}
        workgroupBarrier();
{{ add_magnitudes() }}
{% endif %}
{% else %}
{% for f in range(fragments) %}
        workgroupBarrier();
        subgroupMatrixStore<row_major>(&tiles, team * {{ m * n // 4 }}u, sum_{{ f }}, {{ n // 4 }}u);
{% if columned and f == 0 %}
{{ put_magnitudes() }}
{% endif %}
        workgroupBarrier();
        {
{% if columned and f == 0 %}
{{ add_magnitudes() }}
{% endif %}
{{ store("%du" % f) }}
        }
{% endfor %}
{% endif %}
{% endfor %}
    }
}
