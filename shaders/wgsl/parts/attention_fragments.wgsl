{#
Macros of attention on matrix units (attention_matrix.wgsl and its backwards). The workgroup's block
of rows, side a, lies in storage; of side b, `walk` rows at a time pass through two tiles in
workgroup memory. A step of the walk is two rounds of products, with plain code between them:

    scores    [block, walk]      = a · bᵀ, contracted over the head, for each of `products`
    sums      [block, head_size] += weights · b, contracted over the walk, for each of `outputs`

Between them a lane has `chunk` scores of a row, f32, and leaves their weights there, f16. A file takes the macros with `import … with
context`; they read its constants:
    head_size, a multiple of 16, and walk, a multiple of m, n and k;
    block: rows of side a;
    products, outputs: 1 or 2;
    job_rows, job_columns: of the scores that a subgroup computes; with two products the first half of
        the jobs is of the first;
    out_rows, out_columns: of the sums that a subgroup holds, likewise;
    m, n, k, subgroup_lanes: of fragments;
    cached: whether rows follow those of a text, all of whose keys lie from row 0 on; begin, the first one's
        place among them, is then declared. Else keys are rows among the queries, example by example;
    emulated: whether the same runs in plain WGSL, for tests: a lane then holds every
        subgroup_lanes-th number of a fragment, and side a is read when it is needed.

Everything in workgroup memory is one array, `tiles`, of eight f16 or four f32 an element: two tiles of
[walk][tile_step], then scores [products][block][score_step]. Rows have an element more than they
need, off each other's banks. Fragments that leave pass through the array's beginning.
#}
{% set eights = head_size // 8 %}
{% set tile_step = eights + 1 %}
{% set tile_size = walk * tile_step %}
{% set score_step = walk // 4 + 1 %}
{% set score_size = block * score_step %}
{% set scores_at = 2 * tile_size %}
{% set chunk = k %}
{% set chunks = walk // chunk %}
{% set jobs_across = walk // job_columns %}
{% set jobs = block // job_rows * jobs_across %}
{% set outs_across = head_size // out_columns %}
{% set outs = block // out_rows * outs_across %}
{% set subgroups = [products * jobs, outputs * outs] | max %}
{% set lanes = subgroups * subgroup_lanes %}
{% set stage_size = subgroups * m * n // 4 %}
{% set total = [scores_at + products * score_size, stage_size] | max %}
{% set items = block * chunks %}
{% set turns = (items + lanes - 1) // lanes %}
{% set score_rows = job_rows // m %}
{% set score_columns = job_columns // n %}
{% set sum_rows = out_rows // m %}
{% set sum_columns = out_columns // n %}
{% set held = m * n // subgroup_lanes %}
{% from "parts/fragments.wgsl" import left_type, right_type, result_type, pack_eight, subgroups_entry with context %}

{% macro declare_tiles() %}
const block = {{ block }}u; // rows of side a
const walk = {{ walk }}u; // rows of side b at a time
const lanes = {{ lanes }}u;
var<workgroup> tiles: array<vec4<u32>, {{ total }}>;

{{ pack_eight() }}
// Four numbers out of two words.
fn unpacked(words: vec2<u32>) -> vec4<f32> {
    return vec4(unpack2x16float(words.x), unpack2x16float(words.y));
}
{% endmacro %}

{# The entry point, up to the index of the workgroup. #}
{% macro entry() %}
{{ subgroups_entry() }}
{% endmacro %}

{# What the lane has between the rounds in its q-th turn: `chunk` scores of a row of the block. #}
{% macro declare_item(q) %}
    let item_{{ q }} = lane + {{ q * lanes }}u;
    let local_{{ q }} = item_{{ q }} % block;
    let chunk_{{ q }} = item_{{ q }} / block;
    let row_{{ q }} = first + local_{{ q }};
{% endmacro %}

{# The condition that there is such an item; empty where all lanes have one. #}
{% macro has_item(q) %}{% if items % lanes %}if (item_{{ q }} < {{ items }}u) {% endif %}{% endmacro %}

{# The place of a query row among the keys. #}
{% macro place_of(row) -%}
{{ "(begin + %s)" % row if cached else row }}
{%- endmacro %}

{# The first key that a query row sees: from_{q}; none where the row is not the workgroup's. #}
{% macro declare_from(q) %}
    var from_{{ q }} = 0xffffffffu;
    if (row_{{ q }} >= own && row_{{ q }} < last) {
        from_{{ q }} = {{ "0u" if cached else "segments[row_%d].x" % q }};
{% if window %}
        let place = {{ place_of("row_%d" % q) }};
        if (place >= {{ window }}u) { from_{{ q }} = max(from_{{ q }}, place - {{ window - 1 }}u); }
{% endif %}
    }
{% endmacro %}

{# Of the example of row `part`: the end of the keys that its rows in the block see, `stop`, and the first `key` of the walk. #}
{% macro begin_keys() %}
{% if cached %}
        let stop = begin + last;
        var key = 0u;
{% else %}
        let segment = segments[part];
        let stop = clamp(segment.y, part + 1u, last);
        var key = segment.x;
{% endif %}
{% if window %}
        let end_of_first = {{ place_of("part") }} + 1u;
        if (end_of_first > key + {{ window }}u) { key += (end_of_first - {{ window }}u - key) / walk * walk; }
{% endif %}
{% endmacro %}

{#
Declares: `team`, the subgroup; `job`, which scores it computes, and whether of the second product
(`second`); which sums it holds, out_row, out_column; zero sums; and the rows of side a of its job,
from row `first` on: `sources` = [buffer, stride in eights, column in eights] for each product.
#}
{% macro declare_teams(sources) %}
{% if emulated %}
    let team = lane / {{ subgroup_lanes }}u;
    let team_lane = lane % {{ subgroup_lanes }}u;
{% endif %}
    let job = team % {{ jobs }}u;
{% if products > 1 %}
    let second = team / {{ jobs }}u == 1u;
    let job_tile = select(0u, {{ tile_size }}u, second);
    let job_scores = {{ scores_at }}u + select(0u, {{ score_size }}u, second);
{% else %}
    let job_tile = 0u;
    let job_scores = {{ scores_at }}u;
{% endif %}
    let works = team < {{ products * jobs }}u;
    let job_row = job / {{ jobs_across }}u * {{ job_rows }}u;
    let job_column = job % {{ jobs_across }}u * {{ job_columns }}u;
    let holder = team % {{ outs }}u;
    let out_row = holder / {{ outs_across }}u * {{ out_rows }}u;
    let out_column = holder % {{ outs_across }}u * {{ out_columns }}u;
{% if outputs > 1 %}
    let sums_second = team / {{ outs }}u == 1u;
    let out_tile = select(0u, {{ tile_size }}u, sums_second);
    let out_weights = {{ scores_at }}u + select(0u, {{ score_size }}u, sums_second);
{% else %}
    let out_tile = {{ out_tile_at }}u;
    let out_weights = {{ scores_at }}u;
{% endif %}
    let sums_work = team < {{ outputs * outs }}u;
{% if emulated %}
    var sums = array<f32, {{ sum_rows * sum_columns * held }}>();
{% else %}
{% for i in range(sum_rows) %}
{% for j in range(sum_columns) %}
    var sum_{{ i }}_{{ j }} = {{ result_type }}();
{% endfor %}
{% endfor %}
{% for i in range(score_rows) %}
{% for s in range(head_size // k) %}
    var left_{{ i }}_{{ s }} = {{ left_type }}();
{% endfor %}
{% endfor %}
{% for source in sources %}
{% if products > 1 %}
    if ({{ "!" if loop.first }}second) {
{% else %}
    {
{% endif %}
        let at = (first + job_row) * {{ source[1] }}u + {{ source[2] }};
{% for i in range(score_rows) %}
{% for s in range(head_size // k) %}
        left_{{ i }}_{{ s }} = subgroupMatrixLoad<{{ left_type }}, row_major>(&{{ source[0] }}, at + {{ i * m * source[1] + s * k // 8 }}u, {{ source[1] }}u);
{% endfor %}
{% endfor %}
    }
{% endfor %}
{% endif %}
{% endmacro %}

{#
What a lane reads of side b: `pieces` = [buffer, stride, column] for each tile, rows from `from` on;
a row at or past `end` repeats row end - 1: it gets no weight, but what lies there may be NaN.
#}
{% set units = walk * eights %}
{% set unit_turns = (units + lanes - 1) // lanes %}
{% macro declare_fetched() %}
{% for t in range(2) %}
{% for u in range(unit_turns) %}
    var fetched_{{ t }}_{{ u }} = vec4<u32>();
{% endfor %}
{% endfor %}
{% endmacro %}

{% macro fetch(pieces, from, end) %}
{% for u in range(unit_turns) %}
    {
        let unit = lane + {{ u * lanes }}u;
        let row = min({{ from }} + unit / {{ eights }}u, {{ end }} - 1u);
{% for piece in pieces %}
        fetched_{{ loop.index0 }}_{{ u }} = {{ piece[0] }}[row * {{ piece[1] }}u + {{ piece[2] }} + unit % {{ eights }}u];
{% endfor %}
    }
{% endfor %}
{% endmacro %}

{% macro store_tiles() %}
{% for u in range(unit_turns) %}
{% if (u + 1) * lanes > units %}
    if (lane < {{ units - u * lanes }}u)
{% endif %}
    {
        let unit = lane + {{ u * lanes }}u;
        let at = unit / {{ eights }}u * {{ tile_step }}u + unit % {{ eights }}u;
        tiles[at] = fetched_0_{{ u }};
        tiles[at + {{ tile_size }}u] = fetched_1_{{ u }};
    }
{% endfor %}
{% endmacro %}

{# The first round: scores of every job, into their places. #}
{% macro multiply_scores(sources) %}
    if (works) {
{% if emulated %}
        for (var at = 0u; at < {{ score_rows * score_columns * held }}u; at++) {
            let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
            let row = job_row + at / {{ score_columns * held }}u * {{ m }}u + place / {{ n }}u;
            let column = job_column + at / {{ held }}u % {{ score_columns }}u * {{ n }}u + place % {{ n }}u;
            var sum = 0.0;
            for (var c = 0u; c < {{ head_size }}u; c++) {
                let b = number(tiles[job_tile + column * {{ tile_step }}u + c / 8u], c);
{% if products > 1 %}
                var a = 0.0;
                if (second) {
                    a = number({{ sources[1][0] }}[(first + row) * {{ sources[1][1] }}u + {{ sources[1][2] }} + c / 8u], c);
                } else {
                    a = number({{ sources[0][0] }}[(first + row) * {{ sources[0][1] }}u + {{ sources[0][2] }} + c / 8u], c);
                }
{% else %}
                let a = number({{ sources[0][0] }}[(first + row) * {{ sources[0][1] }}u + {{ sources[0][2] }} + c / 8u], c);
{% endif %}
                sum += a * b;
            }
            tiles[job_scores + row * {{ score_step }}u + column / 4u][column % 4u] = bitcast<u32>(sum);
        }
{% else %}
        let right_at = job_tile + job_column * {{ tile_step }}u;
{% for i in range(score_rows) %}
{% for j in range(score_columns) %}
        var score_{{ i }}_{{ j }} = {{ result_type }}();
{% endfor %}
{% endfor %}
{% for s in range(head_size // k) %}
{% for j in range(score_columns) %}
        {
            let right = subgroupMatrixLoad<{{ right_type }}, col_major>(&tiles, right_at + {{ j * n * tile_step + s * k // 8 }}u, {{ tile_step }}u);
{% for i in range(score_rows) %}
            score_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate(left_{{ i }}_{{ s }}, right, score_{{ i }}_{{ j }});
{% endfor %}
        }
{% endfor %}
{% endfor %}
        let to = job_scores + job_row * {{ score_step }}u + job_column / 4u;
{% for i in range(score_rows) %}
{% for j in range(score_columns) %}
        subgroupMatrixStore<row_major>(&tiles, to + {{ i * m * score_step + j * n // 4 }}u, score_{{ i }}_{{ j }}, {{ score_step }}u);
{% endfor %}
{% endfor %}
{% endif %}
    }
{% endmacro %}

{# The second round: sums += weights · b. A weight of 0 changes nothing. #}
{% macro add_weighted() %}
    if (sums_work) {
{% if emulated %}
        for (var at = 0u; at < {{ sum_rows * sum_columns * held }}u; at++) {
            let place = at % {{ held }}u * {{ subgroup_lanes }}u + team_lane;
            let row = out_row + at / {{ sum_columns * held }}u * {{ m }}u + place / {{ n }}u;
            let column = out_column + at / {{ held }}u % {{ sum_columns }}u * {{ n }}u + place % {{ n }}u;
            var sum = sums[at];
            for (var w = 0u; w < walk; w++) {
                let a = number(tiles[out_weights + row * {{ score_step }}u + w / {{ chunk }}u * {{ chunk // 4 }}u + w % {{ chunk }}u / 8u], w);
                sum += a * number(tiles[out_tile + w * {{ tile_step }}u + column / 8u], column);
            }
            sums[at] = sum;
        }
{% else %}
        let left_at = out_weights + out_row * {{ score_step }}u;
        let right_at = out_tile + out_column / 8u;
{% for s in range(walk // k) %}
        {
{% for i in range(sum_rows) %}
            let left_{{ i }} = subgroupMatrixLoad<{{ left_type }}, row_major>(&tiles, left_at + {{ i * m * score_step + s * chunk // 4 }}u, {{ score_step }}u);
{% endfor %}
{% for j in range(sum_columns) %}
            {
                let right = subgroupMatrixLoad<{{ right_type }}, row_major>(&tiles, right_at + {{ s * k * tile_step + j * n // 8 }}u, {{ tile_step }}u);
{% for i in range(sum_rows) %}
                sum_{{ i }}_{{ j }} = subgroupMatrixMultiplyAccumulate(left_{{ i }}, right, sum_{{ i }}_{{ j }});
{% endfor %}
            }
{% endfor %}
        }
{% endfor %}
{% endif %}
    }
{% endmacro %}

{#
Takes the sums out, a fragment of every subgroup at a time: `use` is code that finds `unit`, the
place of four numbers in `tiles`, with their `row` of the block, their `column` of the head, and
`owner`, the subgroup. `back`: whether what `use` leaves there goes back into the sums.
#}
{% macro through_stage(use, back=false) %}
{% if emulated %}
    for (var fragment = 0u; fragment < {{ sum_rows * sum_columns }}u; fragment++) {
        let fragment_row = fragment / {{ sum_columns }}u * {{ m }}u;
        let fragment_column = fragment % {{ sum_columns }}u * {{ n }}u;
        workgroupBarrier();
        for (var at = 0u; at < {{ held }}u; at++) {
            let place = at * {{ subgroup_lanes }}u + team_lane;
            tiles[team * {{ m * n // 4 }}u + place / 4u][place % 4u] = bitcast<u32>(sums[fragment * {{ held }}u + at]);
        }
        workgroupBarrier();
{{ _each_unit(use) }}
{% if back %}
        workgroupBarrier();
        for (var at = 0u; at < {{ held }}u; at++) {
            let place = at * {{ subgroup_lanes }}u + team_lane;
            sums[fragment * {{ held }}u + at] = bitcast<f32>(tiles[team * {{ m * n // 4 }}u + place / 4u][place % 4u]);
        }
{% endif %}
    }
{% else %}
{% for i in range(sum_rows) %}
{% for j in range(sum_columns) %}
    {
        const fragment_row = {{ i * m }}u;
        const fragment_column = {{ j * n }}u;
        workgroupBarrier();
        subgroupMatrixStore<row_major>(&tiles, team * {{ m * n // 4 }}u, sum_{{ i }}_{{ j }}, {{ n // 4 }}u);
        workgroupBarrier();
{{ _each_unit(use) }}
{% if back %}
        workgroupBarrier();
        sum_{{ i }}_{{ j }} = subgroupMatrixLoad<{{ result_type }}, row_major>(&tiles, team * {{ m * n // 4 }}u, {{ n // 4 }}u);
{% endif %}
    }
{% endfor %}
{% endfor %}
{% endif %}
{% endmacro %}

{% macro _each_unit(use) %}
        for (var unit = lane * 2u; unit < {{ stage_size }}u; unit += {{ 2 * lanes }}u) {
            let owner = unit / {{ m * n // 4 }}u;
            let place = unit % {{ m * n // 4 }}u * 4u;
            let owned = owner % {{ outs }}u;
            let row = owned / {{ outs_across }}u * {{ out_rows }}u + fragment_row + place / {{ n }}u;
            let column = owned % {{ outs_across }}u * {{ out_columns }}u + fragment_column + place % {{ n }}u;
{% if outputs * outs < subgroups %}
            if (owner < {{ outputs * outs }}u)
{% endif %}
            {
{{ use }}
            }
        }
{% endmacro %}

{#
Scores from products: the vec4 `{s}` becomes the scaled, and capped, score; with a cap `{t}` is its
tanh. Of copies of a cache score_power takes out what q and k were multiplied by.
#}
{% macro scale_score(s, t) %}
{% if cached %}
            {{ s }} *= score_power;
{% endif %}
{% if softcap %}
            // Some drivers' tanh overflows; beyond ±10 it is ±1 in f32.
            let {{ t }} = tanh(clamp({{ s }} * {{ scale / softcap }}, vec4<f32>(-10.0), vec4<f32>(10.0)));
            {{ s }} = {{ t }} * {{ softcap }};
{% else %}
            {{ s }} *= {{ scale }};
{% endif %}
{% endmacro %}
