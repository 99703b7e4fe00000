"""Products with frozen quantized matrices, the low-rank part included."""

from __future__ import annotations

from lora.forward.halve_rows import halve_rows, takes_row_copies
from lora.forward.matmul_bodies import record_product
from lora.forward.matmul_paired import row_scales
from lora.forward.part_product import PartProduct, Place, adapted_members
from lora.forward.plans.stretches import Follower
from lora.forward.product import Product
from lora.shaders.activations import activation, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


def matmul(
    program: Program,
    product: Product,
    *,
    out: Tensor | None = None,
    then: Follower | None = None,
    label: str = "matmul",
) -> Tensor:  # [rows, out_features]
    """Appends a product, decoding W in the kernel's tiles.

    Args:
        product: of rows of f32 or f16, without a gate or a norm before it.
        out: where to write; a new tensor by default.
        then: what follows y (a norm, a gate), appended too: as what finishes the product, where
            that is a second pass of its own.
    """
    x, matrix, lora = product.x, product.matrix, product.lora
    if not isinstance(x, Tensor) or product.gate is not None or product.norm is not None:
        raise ValueError(f"{label}: rows of whole numbers, gates and norms are for one row")
    extent = extent_of(x)
    product.check(x.shape[0], label)
    check_shape("matmul input", x, None, matrix.in_features)
    y = out if out is not None else activation(program, extent, matrix.out_features)
    check_shape("matmul output", y, x.shape[0], matrix.out_features)
    whole = len(matrix.parts) == 1
    scaled = product.scaled
    others = (x, y, matrix.parts[0].words, product.z, lora and lora.b, product.residual,
              product.bias, matrix.parts[0].powers, scaled and scaled.scales,
              scaled and scaled.kept)  # fmt: skip
    x_largest, n_others = product.x_largest, sum(tensor is not None for tensor in others)
    if x_largest is None and takes_row_copies(program.recording, x, n_others):
        sized = halve_rows(program, x, label=label)
        x, x_largest = sized.of_units, sized.largest
    elif x_largest is None:
        x_largest = row_scales(program, x, n_others, label)
    elif x.dtype != "f16":
        raise ValueError(f"{label}: rows that are scaled already are f16, not {x.dtype}")
    for part in matrix.parts:
        one = PartProduct(
            x,
            part,
            y,
            transposed=False,
            contraction=matrix.in_features,
            place=None if whole else Place(0, part.first_feature),
            members=tuple(adapted_members(lora, part)),
            low=product.z,
            factor=lora.b if lora else None,
            rank=lora.rank if lora else 0,
            scale=lora.scale if lora else 1.0,
            residual=product.residual,
            bias=product.bias,
            softcap=product.softcap,
            scaled=scaled,
            epilogue=product.epilogue,
            x_largest=x_largest,
            carried=lora is not None and bool(lora.member_scales),
        )
        record_product(program, one, then if whole else None, label)
    if then is not None and not whole:
        then.record(program, y)
    return y
