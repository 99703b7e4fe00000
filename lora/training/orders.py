"""What rank 0 of a run of several processes has the others do; see `lora.training.leading`."""

from __future__ import annotations

from typing import Any

from lora.training.communicator import Communicator


class Orders:
    """What rank 0 has the others do; nothing is said before `leading`, nor by others.

    Attributes:
        leading: whether this process is rank 0 of a run that the others follow.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.leading = False

    def give(self, what: str, *values: Any) -> None:
        """Has the others do what `follow` knows by this name."""
        if self.leading:
            self._communicator.broadcast((what, *values))
