// {% if take %}values[m, j] = logits[m, ids[j]], which becomes 0; values past the {{ n_tokens }} tokens are 0.{% else %}logits[m, ids[j]] = values[m, j] for the {{ n_tokens }} tokens; other columns stay.{% endif %}

// Bindings: ids u32 [{{ n_columns }}], values [rows, {{ n_columns }}], logits [rows, {{ stride }}]. One lane one value: no two
// tokens are the same, so that no two lanes meet.

struct Extent { rows: u32 }

@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> ids: array<u32>;
@group(0) @binding(2) var<storage, {{ "read_write" if take else "read" }}> values: array<f32>;
@group(0) @binding(3) var<storage, read_write> logits: array<f32>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let at = (group.x + group.y * groups.x) * 64u + lane;
    let row = at / {{ n_columns }}u;
    if (row >= extent.rows) { return; }
    let j = at % {{ n_columns }}u;
{% if take %}
    if (j >= {{ n_tokens }}u) {
        values[at] = 0.0;
        return;
    }
    let place = row * {{ stride }}u + ids[j];
    values[at] = logits[place];
    logits[place] = 0.0;
{% else %}
    if (j >= {{ n_tokens }}u) { return; }
    logits[row * {{ stride }}u + ids[j]] = values[at];
{% endif %}
}
