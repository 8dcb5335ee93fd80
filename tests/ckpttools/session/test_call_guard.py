# SPDX-License-Identifier: Apache-2.0
"""One call at a time: nested calls, other threads, forked processes."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import ckpttools as ct
from ckpttools.tree import snapshot

from .runs import spec_for


def test_nested_saves_are_refused_and_threads_wait(tmp_path, monkeypatch):
    real, inner = snapshot.take, []
    with ct.open(spec_for(tmp_path)) as ckpt:

        def interrupted(state, buffers, rules):
            if not inner:
                with pytest.raises(ct.StepOrderError, match="during another of its calls"):
                    inner.append(ckpt.save(9, state))
                inner.append("refused")
                thread = threading.Thread(target=lambda: inner.append(ckpt.save(2, state, on_error="return")))
                thread.start()
                time.sleep(0.05)
                inner.append(thread)
            return real(state, buffers, rules)

        monkeypatch.setattr(snapshot, "take", interrupted)
        ckpt.save(1, {"w": np.ones(2)})
        inner[1].join(20)
        ckpt.wait()
        assert ckpt.all_steps() == (1, 2)
    assert [type(outcome) for outcome in inner[2:]] == [ct.Started]


FORKED = """
import multiprocessing, os, sys, time
import numpy as np
import ckpttools as ct

def save(ckpt):
    try:
        ckpt.save(3, {"w": np.ones(2)})
    except ct.RunInUseError:
        os._exit(7)

def outlive():
    os.close(1)  # whoever reads the parent's output must not wait for this process
    os.close(2)
    time.sleep(60)

if __name__ == "__main__":
    with ct.open(ct.CheckpointSpec(directory=sys.argv[1])) as ckpt:
        ckpt.save(1, {"w": np.ones(2)})
        ckpt.wait()
        next(ckpt.steps(5))
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=save, args=(ckpt,))
        child.start()
        child.join()
        print(child.exitcode)
        sleeper = fork.Process(target=time.sleep, args=(60,))
        sleeper.start()
        time.sleep(0.2)
        sleeper.terminate()
        sleeper.join(10)
        print(sleeper.exitcode)
        orphan = fork.Process(target=outlive)
        orphan.start()
        print(orphan.pid, flush=True)
        os.kill(os.getpid(), 9)
"""


def test_a_forked_process_neither_saves_nor_holds_the_lock(tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    refused, terminated, orphan = ended.stdout.split()
    try:
        assert (refused, terminated) == ("7", "-15"), ended.stderr
        os.kill(int(orphan), 0)  # it lives
        with ct.open(spec_for(tmp_path / "run")) as ckpt:
            assert ckpt.restore({"w": np.ones(2)}).step == 1
            ckpt.save(2, {"w": np.ones(2)})
    finally:
        os.kill(int(orphan), signal.SIGKILL)
