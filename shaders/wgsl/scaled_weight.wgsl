// scaled[0] = weight · scale / {{ begin }}: what each trained token counts, with the loss scale of now in
// place of the first one; all are powers of two, so that no bit of the rest changes. And where a step
// begins: its first try keeps the scale that it began with; `again` lets one go that was held. One lane.
// Bindings: weight (a uniform), metrics of step_guard, scaled [4].

struct Weight { value: f32, again: f32 }

@group(0) @binding(0) var<uniform> weight: Weight;
@group(0) @binding(1) var<storage, read_write> metrics: array<f32>;
@group(0) @binding(2) var<storage, read_write> scaled: array<f32>;

@compute @workgroup_size(1)
fn main() {
    let scale = metrics[{{ state + 4 }}];
    scaled[0] = weight.value * (scale * {{ 1.0 / begin }});
    if (weight.again != 0.0) {
        metrics[{{ state + 9 }}] = 0.0;
    } else if (metrics[{{ state + 9 }}] == 0.0) {
        metrics[{{ state + 8 }}] = 0.0;
        metrics[{{ state + 10 }}] = scale;
    }
}
