"""`adapter.trainable_tokens`, ids and texts, as ids of a model's vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora.shaders.errors import InputError

_KEY = "adapter.trainable_tokens"


def token_ids(
    tokens: Sequence[int | str], vocab_size: int, encode: Callable[[str], Sequence[int]]
) -> tuple[int, ...]:
    """The ids that they name, in their order.

    Args:
        tokens: ids, and texts that are one token each.
        vocab_size: rows of the embedding.
        encode: a text's tokens; asked for texts alone.

    Raises:
        InputError: a text is not one token, or a token stands there twice or has no row.
    """
    found: list[int] = []
    for token in tokens:
        ids = [token] if isinstance(token, int) else list(encode(token))
        if len(ids) != 1:
            raise InputError(
                f"{_KEY}: {token!r} is {len(ids)} tokens of this model "
                f"({', '.join(map(str, ids[:8]))}); name one of its vocabulary, such as one that "
                "is kept free for new uses. A GGUF's vocabulary can't be added to here."
            )
        if ids[0] >= vocab_size:
            raise InputError(
                f"{_KEY}: {token!r} has the id {ids[0]}, but the model's embedding has "
                f"{vocab_size} rows, and none can be added to a GGUF here."
            )
        if ids[0] in found:
            raise InputError(f"{_KEY}: names the token {ids[0]} twice.")
        found += ids
    return tuple(found)
