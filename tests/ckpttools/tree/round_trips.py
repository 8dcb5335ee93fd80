# SPDX-License-Identifier: Apache-2.0
"""A value saved and restored into a template, for the tests of a state's leaves."""

import ckpttools as ct


def round_trip(directory, value, template):
    spec = ct.CheckpointSpec(directory=directory)
    with ct.open(spec) as ckpt:
        ckpt.save(1, {"item": value})
        return ckpt.restore({"item": template}).state["item"]


class Iterator:
    def __init__(self, state):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state
