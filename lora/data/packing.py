"""Best-fit decreasing: which examples go into one row together, so that little of it stays empty.

The longest go first, each into the row with the least room that still has room for it.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np


def best_fit_decreasing(
    order: np.ndarray, lengths: np.ndarray, capacity: int
) -> tuple[np.ndarray, np.ndarray]:
    """Packs examples into rows.

    An example longer than the capacity gets a row of its own; data.max_length keeps that from
    happening.

    Args:
        order: the examples; of those of one length the first here go first.
        lengths: tokens of each example there is.
        capacity: tokens of a row.

    Returns:
        the examples, int64, row by row, and where each row begins, one number more than there are
        rows. Rows stand in the order in which they were begun.
    """
    own = lengths[order]
    longest_first = np.argsort(-own, kind="stable")
    rooms: list[int] = []  # ascending: how much room some row has
    rows_of: dict[int, list[int]] = {}  # by their room; the last is taken first
    row_of = np.empty(len(order), np.int64)
    n_rows = 0
    for place, length in zip(longest_first.tolist(), own[longest_first].tolist(), strict=True):
        found = bisect_left(rooms, length)
        if found == len(rooms):
            row, room = n_rows, capacity
            n_rows += 1
        else:
            room = rooms[found]
            row = rows_of[room].pop()
            if not rows_of[room]:
                del rooms[found]
        row_of[place] = row
        left = room - length
        if left > 0:
            held = rows_of.setdefault(left, [])
            if not held:
                rooms.insert(bisect_left(rooms, left), left)
            held.append(row)
    by_row = np.argsort(row_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=n_rows))])
    return order[by_row].astype(np.int64), starts.astype(np.int64)
