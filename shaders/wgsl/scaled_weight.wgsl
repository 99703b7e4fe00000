// scaled[0] = weight · scale / {{ begin }}: what each trained token counts, with the loss scale of now in
// place of the first one; all are powers of two, so that no bit of the rest changes. One lane.
// Bindings: weight (a uniform), metrics of step_guard, scaled [4].

struct Weight { value: f32 }

@group(0) @binding(0) var<uniform> weight: Weight;
@group(0) @binding(1) var<storage, read> metrics: array<f32>;
@group(0) @binding(2) var<storage, read_write> scaled: array<f32>;

@compute @workgroup_size(1)
fn main() {
    scaled[0] = weight.value * (metrics[{{ scale_at }}] * {{ 1.0 / begin }});
}
