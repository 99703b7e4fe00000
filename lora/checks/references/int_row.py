"""What the words of a row of whole numbers stand for."""

import numpy as np

from lora.forward.int_row import BLOCK


def decoded_int_row(words: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers that the words of an int row stand for, and what each block brings besides.

    Returns:
        f64 [width]; f32 [blocks, 4]: scale, the two sums, the sum of squares.
    """
    blocks = width // BLOCK
    digits = words[0, : 24 * blocks].view(np.int8).reshape(3, 2, blocks, 4, 4)  # … word, byte
    about = words[0, 24 * blocks :].view(np.float32).reshape(blocks, 4)
    whole = sum(digits[p].astype(np.int64) << (8 * p) for p in range(3))
    values = np.moveaxis(whole, 0, 2).reshape(blocks, BLOCK)  # [block, word, half, byte]
    return (values * about[:, :1].astype(np.float64)).reshape(-1), about
