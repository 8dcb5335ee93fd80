# SPDX-License-Identifier: Apache-2.0
"""Random saves, rollbacks, damage and crashes, compared with a model of branches that knows nothing of lineages.

The model remembers which save continued from which step. The ancestors of the last save are the live steps.
"""

import contextlib
import dataclasses
import random
import warnings

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.spec import retention
from ckpttools.store import commit, layout
from ckpttools.store.run_directory import RunDirectory
from tests.ckpttools.restore.test_first_intact import flip_bit, largest_file

KEEPS = [
    ct.Latest(1),
    ct.Latest(3),
    ct.Best("loss", mode="min"),
    ct.Latest(2) | ct.Best("loss", mode="max"),
    ct.EveryNSteps(7),
    ct.Pinned((5, 9)),
]


def make_state(value=0):
    return {"model": {"w": np.full(2048, value, np.int32)}}


@dataclasses.dataclass(eq=False)
class Node:
    """A committed step; `value` is what its state holds, and differs in all steps."""

    step: int
    value: int
    parent: "Node | None"
    damaged: bool = False


class Run:
    """A run under random operations, and the model of what it must hold."""

    def __init__(self, directory, keep, random_source):
        self.directory, self.random = directory, random_source
        self.spec = ct.CheckpointSpec(directory=directory, keep=keep, storage=ct.Storage(asynchronous=False))
        self.nodes: list[Node] = []
        self.head: Node | None = None  # the last commit
        self.base: Node | None = None  # what the next save continues from
        self.pinned: set[int] = set()
        self.session = ct.open(self.spec)
        self.session.restore(make_state())

    def close(self):
        self.session.close()

    def list_live(self):
        chain, node = [], self.head
        while node is not None:
            chain.append(node)
            node = node.parent
        return chain  # the newest first

    def find_on_disk(self):
        """Return the nodes on the disk, by reading the value of each step, where it can be read."""
        by_key = {(node.step, node.value): node for node in self.nodes}
        found = {}
        for row, entry in self._list_entries():
            node = by_key.get((entry.step, round(entry.manifest.summary.metrics["value"])))
            found[node] = row
        return found

    def _list_entries(self):
        steps = RunDirectory(self.directory).get_steps()
        return [(entry.info, entry) for entry in steps.committed_entries]

    # The operations.

    def save(self, *, crash=""):
        step = (self.base.step if self.base else 0) + self.random.randint(1, 4)
        node = Node(step, len(self.nodes) + 1, self.base)
        before = self.find_on_disk()
        loss = self.random.random()
        with contextlib.ExitStack() as stack:
            if crash == "before the commit":
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr(commit, "commit_step", fail)
                stack.enter_context(contextlib.suppress(ct.StorageError))
            if crash == "before the deletion":
                patch = stack.enter_context(pytest.MonkeyPatch.context())
                patch.setattr(RunDirectory, "prune", lambda *args, **options: ())
            self.session.save(step, make_state(node.value), {"loss": loss, "value": node.value})
            self.nodes.append(node)
            self.head = self.base = node
        if crash:
            return self.reopen()
        self.check(before, added=node)
        return True

    def restore(self):
        """Go to any step on the disk, also to a superseded or a damaged one."""
        found = sorted({node.step for node in self.find_on_disk()})
        if not found:
            return
        step = self.random.choice(found)
        candidates = [node for node in self.find_on_disk() if node.step == step]
        live = [node for node in candidates if node in self.list_live()]
        expected = (live or sorted(candidates, key=lambda node: node.value))[-1]
        try:
            report = self.session.restore(make_state(), step=step)
        except ct.StepDamagedError:
            visible = not any(path.name == str(step) and is_whole(path) for path in self.directory.iterdir())
            assert expected.damaged or visible
            return
        assert report.step == step
        assert int(report.state["model"]["w"][0]) == expected.value
        self.base = expected

    def reopen(self):
        """End the program and start it again: it must continue from the newest intact live step."""
        self.session.close()
        self.session = ct.open(self.spec)
        on_disk = self.find_on_disk()
        intact = [node for node in self.list_live() if node in on_disk and not node.damaged]
        superseded = [node for node in on_disk if node not in self.list_live() and not node.damaged]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ct.CheckpointWarning)
            if self.nodes and not intact:
                with pytest.raises((ct.NoIntactStepError, ct.StepNotFoundError)) as caught:
                    self.session.restore(make_state())
                assert all(str(node.step) in str(caught.value) for node in superseded)
                return False
            report = self.session.restore(make_state())
        if report.step is None:
            assert not self.nodes
            return True
        assert int(report.state["model"]["w"][0]) == intact[0].value
        self.base = intact[0]
        return True

    def damage(self):
        """Damage a step: its manifest, which a listing notices, or its data, which only a restore does."""
        paths = [path for path in self.directory.iterdir() if path.name.isdecimal() and is_whole(path)]
        if not paths:
            return True
        path = self.random.choice(paths)
        by_path = {entry.path: round(entry.manifest.summary.metrics["value"]) for _, entry in self._list_entries()}
        node = next(node for node in self.nodes if node.value == by_path[path])
        node.damaged = True
        if self.random.random() < 0.5:
            flip_bit(largest_file(path / "model"))
            return self.reopen()  # until then, nothing can know
        (path / layout.MANIFEST).write_bytes(b"{}")
        return self.reopen() if self.random.random() < 0.5 else True

    def pin(self):
        found = sorted({node.step for node in self.find_on_disk()})
        if found:
            step = self.random.choice(found)
            self.session.pin(step)
            self.pinned.add(step)

    def prune(self):
        before = self.find_on_disk()
        self.session.close()
        keep = self.random.choice(KEEPS)
        predicted = [verdict.step for verdict in ct.prune(self.directory, keep, dry_run=True) if not verdict.keep]
        assert self.find_on_disk().keys() == before.keys(), "a dry run deletes nothing"
        ct.prune(self.directory, keep)
        after = self.find_on_disk()
        assert sorted(info.sequence for info in predicted) == sorted(
            before[node].sequence for node in before.keys() - after.keys()
        )
        self.check(before)
        return self.reopen()

    # What must hold.

    def check(self, before, added=None):
        after, live = self.find_on_disk(), self.list_live()
        known = [node for node in live if node in before or node is added]
        kept = [node for node in known if node in after]
        assert len(kept) >= min(2, len(known)), "two live steps stay while two exist"
        assert kept[:2] == known[:2], "the newest two live steps stay"
        intact = [node for node in known if not node.damaged]
        assert not intact or intact[0] in after, "the newest intact live step stays"
        assert all(node in after for node in before if node.step in self.pinned), "pinned steps stay"
        begins = next((index for index, node in enumerate(live) if self._is_branch_point(node)), None)
        if begins is not None and len([node for node in live[:begins] if node in after]) < 2:
            assert live[begins] in after or live[begins] not in before, "the base stays until two live steps follow"
        for node, info in after.items():
            assert info.superseded == (node not in live)

    def _is_branch_point(self, node):
        return sum(each.parent is node for each in self.nodes) > 1


def fail(*args, **options):
    raise OSError(5, "Input/output error")


def is_whole(path):
    manifest = path / layout.MANIFEST
    return manifest.is_file() and manifest.stat().st_size > 2


def play(directory, seed, count=14):
    """Play one random sequence; it ends when no live step is left."""
    source = random.Random(seed)
    run = Run(directory, source.choice(KEEPS), source)
    try:
        for _ in range(count):
            name = source.choices(
                ["save", "before the commit", "before the deletion", "restore", "reopen", "damage", "pin", "prune"],
                [10, 1, 1, 5, 1, 2, 1, 1],
            )[0]
            alive = run.save(crash=name) if name.startswith("before") else getattr(run, name)()
            if alive is False:
                break
    finally:
        run.close()


@pytest.mark.parametrize("seed", range(8))
def test_branches_keep_what_a_run_needs(tmp_path, seed):
    play(tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1000, 1200))
def test_branches_keep_what_a_run_needs_in_many_sequences(tmp_path, seed):
    play(tmp_path, seed, count=30)


def decide_by_commits_alone(keep, steps, *, newest_verified):
    """The rule before branches: all steps compete, the superseded ones too."""
    ordered = sorted(steps, key=lambda step: step.sequence)
    kept = {*keep.select_steps(ordered), newest_verified, *(step.sequence for step in ordered[-2:])}
    return [retention.Verdict(step, step.sequence in kept or step.pinned, "control") for step in ordered]


def test_the_rule_that_counts_superseded_steps_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "decide_retention", decide_by_commits_alone)
    with pytest.raises(AssertionError, match="stay"):
        play_several(tmp_path, 8)


def play_several(directory, count):
    for seed in range(count):
        play(directory / str(seed), seed)
