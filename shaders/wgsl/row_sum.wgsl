// Sum of one value a lane over a workgroup of `lanes` lanes (a power of two), in a fixed tree, so
// that one input gives one result bit for bit. Every lane must call it; every lane gets the sum.
var<workgroup> partial_sums: array<f32, lanes>;

fn row_sum(value: f32, lane: u32) -> f32 {
    workgroupBarrier(); // a second call must not overwrite what a slow lane still reads
    partial_sums[lane] = value;
    workgroupBarrier();
    for (var stride = lanes / 2u; stride > 0u; stride /= 2u) {
        if (lane < stride) {
            partial_sums[lane] += partial_sums[lane + stride];
        }
        workgroupBarrier();
    }
    return partial_sums[0];
}
