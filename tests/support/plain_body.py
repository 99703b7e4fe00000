"""A body of products to show what one takes: a lane for each number that comes out, F32 weights."""

from __future__ import annotations

from gguf import GGMLQuantizationType

from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.matmul_bodies import Body
from lora.forward.part_product import PartProduct, place_uniforms
from lora.forward.plans.matmul_plans import Request
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.program import Program
from lora.shaders.recording import Recording

_CODE = """
struct Extent {{ rows: u32 }}
@group(0) @binding(0) var<uniform> extent: Extent;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read> w: array<f32>;
@group(0) @binding(3) var<storage, read_write> y: array<f32>;
{bindings}
@compute @workgroup_size(64) fn main(@builtin(global_invocation_id) at: vec3<u32>) {{
    let row = at.x / {n_columns}u;
    let column = at.x % {n_columns}u;
    if (row >= extent.rows) {{ return; }}
    var sum = 0.0;
    for (var k = 0u; k < {contraction}u; k++) {{
        sum += x[row * {x_stride}u + k + {x_column}] * w[{weight}];
    }}
    let to = row * {out_stride}u + column + {out_column};
    y[to] = sum{after};
}}"""


def fits(recording: Recording, one: PartProduct) -> bool:
    """Plain products in f32: no low-rank part, no cap."""
    return (
        one.part.quantization is QUANTIZATIONS[GGMLQuantizationType.F32]
        and {one.x.dtype, one.out.dtype} == {"f32"}
        and not one.members
        and one.softcap is None
    )


def record(program: Program, request: Request, _: Plan | None) -> None:
    """Appends the product, and what follows it."""
    c = request.constants
    names = [
        *(["residual"] if c["epilogue"] == "residual" else []),
        *(["bias"] if c["bias"] else []),
    ]
    bindings = [f"var<storage, read> {name}: array<f32>;" for name in names]
    bindings += ["var<uniform> place: vec4<u32>;"] if c["placed"] else []
    after = {"residual": " + residual[to]", "accumulate": " + y[to]", "write": ""}[c["epilogue"]]
    after += f" + bias[column + {'place.y' if c['placed'] else '0u'}]" if c["bias"] else ""
    transposed = f"k * {c['weight_columns']}u + column"
    code = _CODE.format(
        **{name: c[name] for name in ("n_columns", "contraction", "x_stride", "out_stride")},
        bindings="\n".join(f"@group(0) @binding({4 + i}) {b}" for i, b in enumerate(bindings)),
        x_column="place.x" if c["placed"] else "0u",
        out_column="place.y" if c["placed"] else "0u",
        weight=transposed if c["transposed"] else f"column * {c['weight_columns']}u + k",
        after=after,
    )
    tensors = [*request.tensors, *request.after, *place_uniforms(program, request.place)]
    n_lanes = request.extent.maximum * c["n_columns"]
    program.dispatch_wgsl(f"plain {request.label}", code, tensors, -(-n_lanes // 64))
    if request.then is not None:
        request.then.record(program, request.out)


PLAIN = Body(fits, lambda *_: (), record)
