# SPDX-License-Identifier: Apache-2.0
"""Shuffled windows over text that every Python installation has, with a state that can be saved."""

import inspect
import pydoc_data.topics
import textwrap
from typing import Any

import numpy as np

VOCAB = 128  # ASCII; everything else becomes "?"


def load_text() -> np.ndarray:
    """Return Python's documentation and some of its sources as character codes, shape `(n,)`, int32."""
    parts = [*pydoc_data.topics.topics.values(), inspect.getsource(inspect), inspect.getsource(textwrap)]
    return np.frombuffer("\n".join(parts).encode("ascii", "replace"), dtype=np.uint8).astype(np.int32)


class Windows:
    """Endless batches of windows, in a new random order each epoch.

    Args:
        text: Character codes, shape `(n,)`.
        batch: Windows per batch.
        seq: Characters per window; a batch has one more, for the targets.
        seed: Seed of the order.
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
        # Seed and epoch determine the order, so two ints are the whole state.
        order = np.random.default_rng([self.seed, self.epoch]).permutation(starts)
        chosen = order[self.position * self.batch : (self.position + 1) * self.batch]
        self.position += 1
        return self.text[chosen[:, None] + np.arange(self.seq + 1)]

    def get_state(self) -> dict[str, Any]:
        """Return the position of the iterator."""
        return {"epoch": self.epoch, "position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.epoch, self.position = state["epoch"], state["position"]
