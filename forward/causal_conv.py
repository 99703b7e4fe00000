"""Causal convolutions of columns over the rows before: LFM2's between gates, Qwen3.5's with SiLU.

Sources: `Lfm2ShortConv` and `Qwen3_5GatedDeltaNet` in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora.shaders.activations import check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class Convolution:
    """What is convolved with what.

    Attributes:
        weight: f32 [taps, width]; the last tap is a row's own.
        gated: a row of x is B, C and x of `width` columns each; B · x is convolved, and C times
            that comes out. Otherwise the first `width` columns are, and SiLU of that comes out.
    """

    weight: Tensor
    gated: bool

    @property
    def taps(self) -> int:
        """Rows that are seen, a row's own included."""
        return self.weight.shape[0]

    @property
    def width(self) -> int:
        """Columns that are convolved."""
        return self.weight.shape[1]

    def constants(self, x: Tensor) -> dict[str, Any]:
        """The template constants that the kernels share, once x fits."""
        check_f32("causal_conv", weight=self.weight)
        stride, width = x.shape[1], self.width
        if width % 4 or stride % 4 or stride < (3 if self.gated else 1) * width:
            raise ValueError(f"causal_conv: {width} of {stride} columns: not by 4, or too many")
        return {
            "taps": self.taps, "width": width, "stride": stride, "gated": self.gated,
            "x_type": x.dtype,
        }  # fmt: skip


def causal_conv(
    program: Program, x: Tensor, convolution: Convolution, segments: Tensor, out: Tensor
) -> None:
    """Appends the convolution over the rows of each example.

    Args:
        program: what the dispatch is appended to.
        x: [rows, any width], f32 or f16.
        convolution: of it.
        segments: u32 [rows, 2], first row and end of the row's example.
        out: [rows, width], f32 or f16.
    """
    check_shape("causal_conv segments", segments, x.shape[0], 2)
    _record(program, x, convolution, [segments], out, text=False)


def causal_conv_text(
    program: Program, x: Tensor, convolution: Convolution, positions: Tensor, state: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Appends the convolution over new rows of a text, and what it leaves for the next.

    Args:
        program: what the dispatches are appended to.
        x, convolution, out: as of `causal_conv`.
        positions: u32 [rows], in the text.
        state: f32 [taps − 1, width], what was convolved of the rows before; it is not read where
            the text begins with these rows.
    """
    check_f32("causal_conv", state=state)
    check_shape("causal_conv positions", positions, x.shape[0])
    check_shape("causal_conv state", state, convolution.taps - 1, convolution.width)
    _record(program, x, convolution, [positions, state], out, text=True)
    tensors = [extent_of(x).uniform, x, positions, state]
    n_groups = -(-convolution.width // 256)
    program.dispatch("conv_state", convolution.constants(x), tensors, n_groups)


def _record(
    program: Program, x: Tensor, convolution: Convolution, places: list[Tensor], out: Tensor,
    *, text: bool,
) -> None:  # fmt: skip
    check_shape("causal_conv output", out, x.shape[0], convolution.width)
    extent = extent_of(x)
    program.dispatch(
        "causal_conv",
        convolution.constants(x) | {"y_type": out.dtype, "text": text},
        [extent.uniform, x, convolution.weight, out, *places],
        -(-extent.maximum * convolution.width // 256),
    )
