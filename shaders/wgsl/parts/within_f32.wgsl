const LARGEST = 3.4028234e38;  // of an f32

// A number as it is, an infinite one as the largest of its sign. By the bits: a WGSL compiler may
// assume that no infinity occurs.
fn within(value: vec4<f32>) -> vec4<f32> {
    let bits = bitcast<vec4<u32>>(value);
    let overflows = (bits & vec4<u32>(0x7f800000u)) == vec4<u32>(0x7f800000u);
    let largest = (bits & vec4<u32>(0x80000000u)) | vec4<u32>(0x7f7fffffu);
    return select(value, bitcast<vec4<f32>>(largest), overflows);
}
