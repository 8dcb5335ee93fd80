# SPDX-License-Identifier: Apache-2.0
"""Text that is on every machine, in shuffled windows, with a state that can be saved."""

import inspect
import pydoc_data.topics
import textwrap
from typing import Any

import numpy as np

VOCAB = 128  # ASCII; everything else becomes "?"


def load_text() -> np.ndarray:
    """Python's own documentation and some of its sources as character codes, shape `(n,)`, int32."""
    parts = [*pydoc_data.topics.topics.values(), inspect.getsource(inspect), inspect.getsource(textwrap)]
    return np.frombuffer("\n".join(parts).encode("ascii", "replace"), dtype=np.uint8).astype(np.int32)


class Windows:
    """Endless batches of windows in a fresh random order each epoch.

    Args:
        text: Character codes, shape `(n,)`.
        batch: Windows per batch.
        seq: Characters per window; a batch has one more, for the targets.
        seed: Of the order.
    """

    def __init__(self, text: np.ndarray, *, batch: int, seq: int, seed: int) -> None:
        self.text, self.batch, self.seq, self.seed = text, batch, seq, seed
        self.epoch, self.position = 0, 0

    def __iter__(self) -> "Windows":
        return self

    def __next__(self) -> np.ndarray:
        starts = np.arange(0, len(self.text) - self.seq - 1, self.seq)
        if (self.position + 1) * self.batch > len(starts):
            self.epoch, self.position = self.epoch + 1, 0
        # The order of an epoch follows from seed and epoch, so two ints are the whole state.
        order = np.random.default_rng([self.seed, self.epoch]).permutation(starts)
        chosen = order[self.position * self.batch : (self.position + 1) * self.batch]
        self.position += 1
        return self.text[chosen[:, None] + np.arange(self.seq + 1)]

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands."""
        return {"epoch": self.epoch, "position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.epoch, self.position = state["epoch"], state["position"]
