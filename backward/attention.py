"""The gradient of causal self-attention; scores are computed again (Dao 2022, 2023)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from lora.backward.rope import rope_backward
from lora.forward import attention as forward_attention
from lora.forward.attention import activation_like, attention_constants, visible_pairs
from lora.forward.attention_matrix import MatrixCut, cut_constants
from lora.forward.heads import Heads, Rotation
from lora.forward.rope import HeadSums, turns_whole
from lora.shaders.activations import activation, check_f32, check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor

SPLIT_BELOW = 512  # workgroups of key heads on a GPU; set it by benchmarks/attention.py

_BLOCK = 32  # rows of the largest block of keys
_SUM_LANES = 64


@dataclass(frozen=True)
class Attended:
    """What `attention` was given and what it gave."""

    qkv: Tensor  # [rows, (n_heads + 2 n_kv_heads) · head_size]
    out: Tensor  # [rows, n_heads · head_size]
    lse: Tensor  # [rows, n_heads]


def attention_backward(
    program: Program,
    attended: Attended,
    d_out: Tensor,
    segments: Tensor,
    heads: Heads,
    *,
    d_qkv: Tensor | None = None,
    dots: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:  # [rows, (n_heads + 2 n_kv_heads) · head_size]
    """Appends the gradient of `attention` to its qkv: two to four dispatches, no atomics.

    Bit for bit, an example's result does not depend on where it lies or on what lies beside it.

    Args:
        program: what the dispatches are appended to.
        attended: of the forward.
        d_out: [rows, n_heads · head_size].
        segments: u32 [rows, 2], as the forward had them.
        heads: as the forward had them.
        d_qkv: where to write; a new tensor by default. qkv, out, d_out and d_qkv may be f16.
        dots: [rows, n_heads], for each row's d_out · out; a new tensor by default.
        rotation: of q and k before attention; where given, their gradients are turned back, too.
    """
    qkv, out, lse = attended.qkv, attended.out, attended.lse
    n_heads, n_kv_heads, head_size = heads.n_heads, heads.n_kv_heads, heads.head_size
    extent = extent_of(qkv)
    rows, recording = qkv.shape[0], program.recording
    constants = attention_constants(qkv, segments, heads)
    check_shape("attention output", out, rows, n_heads * head_size)
    check_shape("attention d_out", d_out, rows, n_heads * head_size)
    check_f32("attention_backward", lse=lse, dots=dots)
    check_shape("attention log-sum-exp", lse, rows, n_heads)
    d_x = d_qkv if d_qkv is not None else activation_like(program, qkv, qkv.shape[1])
    check_shape("attention d_qkv", d_x, *qkv.shape)
    row_dots = dots if dots is not None else activation(program, extent, n_heads)
    check_shape("attention dots", row_dots, rows, n_heads)
    pairs = visible_pairs(extent.maximum, heads.window)

    tile_type = "f16" if qkv.dtype == d_out.dtype == "f16" else "f32"
    types = {"tile_type": tile_type, "qkv_type": qkv.dtype, "d_out_type": d_out.dtype}
    halves = tile_type == out.dtype == d_x.dtype == "f16"
    of_matrix = forward_attention.matrix_constants(constants)

    def cut_of(kernel: str) -> MatrixCut | None:
        cut = forward_attention.choose_cut
        return cut(kernel, recording, rows, n_heads, head_size) if halves else None

    q_tensors = [extent.uniform, qkv, out, d_out, lse, row_dots, segments, d_x]
    q_flops = 6 * head_size * n_heads * pairs
    cut = cut_of("attention_backward_q")
    if cut is not None:
        program.dispatch(
            "attention_matrix_backward_q",
            {**of_matrix, **cut_constants(recording, cut, rows)},
            q_tensors,
            cut.workgroups(rows, n_heads),
            flops=q_flops,
        )
    else:
        tile = forward_attention.choose_tile(
            "attention_backward_q", recording, rows, n_heads, head_size, tile_type
        )
        program.dispatch(
            "attention_backward_q",
            {**constants, **types, "out_type": out.dtype, "d_qkv_type": d_x.dtype, **asdict(tile)},
            q_tensors,
            tile.workgroups(rows, n_heads),
            flops=q_flops,
        )
    split = choose_split(recording, rows, n_heads, n_kv_heads, d_x.dtype)
    owners = n_heads if split else n_kv_heads
    sums = recording.memory.scratch((rows, 2 * n_heads * head_size)) if split else d_x
    kv_tensors = [extent.uniform, qkv, d_out, lse, row_dots, segments, sums]
    kv_flops = 8 * head_size * n_heads * pairs
    cut = cut_of("attention_backward_kv")  # of grouped heads it leaves the sum to another kernel
    if cut is not None and owners == n_heads:
        program.dispatch(
            "attention_matrix_backward_kv",
            {**of_matrix, **cut_constants(recording, cut, rows), "split": split},
            kv_tensors,
            cut.workgroups(rows, n_heads),
            flops=kv_flops,
        )
    else:
        tile = forward_attention.choose_tile(
            "attention_backward_kv", recording, rows, owners, head_size, tile_type
        )
        program.dispatch(
            "attention_backward_kv",
            {**constants, **types, "sums_type": sums.dtype, **asdict(tile), "split": split},
            kv_tensors,
            tile.workgroups(rows, owners),
            flops=kv_flops,
        )
    n_turned, sums_of_heads = n_heads + n_kv_heads, None
    if split and rotation is not None and turns_whole(rotation, head_size, d_x.shape[1]):
        sums_of_heads = HeadSums(sums, n_heads, n_kv_heads)
    elif split:
        shapes = ("n_heads", "n_kv_heads", "head_size", "stride")
        program.dispatch(
            "attention_backward_kv_sum",
            {name: constants[name] for name in shapes}
            | {"lanes": _SUM_LANES, "d_qkv_type": d_x.dtype},
            [extent.uniform, sums, d_x],
            -(-rows * n_kv_heads * head_size // (2 * _SUM_LANES)),
        )
    if rotation is not None:
        rope_backward(program, d_x, rotation, n_turned, head_size, sums=sums_of_heads)
    return d_x


def choose_split(
    recording: Recording, rows: int, n_heads: int, n_kv_heads: int, dtype: str = "f32"
) -> bool:
    """Whether query heads that share a key head are summed by workgroups of their own.

    That is faster where key heads alone give too few workgroups, and takes scratch of two rows of
    queries for each row; the sums come out the same, bit for bit. Where the sums end in f16, it is
    what keeps them in f32 until then.
    """
    few = not recording.facts.is_cpu and -(-rows // _BLOCK) * n_kv_heads < SPLIT_BELOW
    return n_heads > n_kv_heads and (few or dtype == "f16")
