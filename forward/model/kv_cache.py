"""The keys and values of the tokens so far, kept on the device."""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.model.layer_spec import Attention
from lora.shaders.activations import check_shape, extent_of
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Tensor


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, in the order in which attention_decode.wgsl reads them."""

    keys: Tensor  # [kv_size / 4, room, 4]: lanes that each take one key read side by side
    values: Tensor  # [room, kv_size]

    @classmethod
    def allocate(cls, recording: Recording, attention: Attention, room: int) -> LayerCache:
        """Tensors for the keys and values of one text of up to `room` tokens, in f32."""
        kv_size = attention.kv_size
        return cls(
            recording.memory.empty((kv_size // 4, room, 4), purpose="key-value cache"),
            recording.memory.empty((room, kv_size), purpose="key-value cache"),
        )


@dataclass(frozen=True)
class TextState:
    """What a recurrent layer keeps of a text: as much after one token as after a thousand.

    Attributes:
        tensors: f32, of any shape; a kernel that a text begins with reads none of them.
    """

    tensors: tuple[Tensor, ...]


def store_keys_values(
    program: Program, qkv: Tensor, positions: Tensor, cache: LayerCache, *, query_size: int
) -> None:
    """Appends: the k and v of each row go into the cache at the row's position.

    Args:
        qkv: [rows, query_size + 2 · kv_size], k rotated.
        positions: u32 [rows], each below the cache's room (the host checks).
        cache: of the layer.
        query_size: columns of q, which k and v follow.
    """
    extent = extent_of(qkv)
    room, kv_size = cache.values.shape
    check_shape("kv_store qkv", qkv, None, query_size + 2 * kv_size)
    check_shape("kv_store positions", positions, qkv.shape[0])
    check_shape("kv_store keys", cache.keys, kv_size // 4, room, 4)
    if kv_size % 4 or query_size % 4:
        raise ValueError(f"kv_store: widths must be multiples of 4: {qkv.shape}")
    constants = {
        "kv_size": kv_size,
        "query_size": query_size,
        "stride": qkv.shape[1],
        "room": room,
    }
    tensors = [extent.uniform, qkv, positions, cache.keys, cache.values]
    n_groups = -(-extent.maximum * kv_size // 256)  # of 64 lanes with four columns each
    program.dispatch("kv_store", constants, tensors, n_groups)
