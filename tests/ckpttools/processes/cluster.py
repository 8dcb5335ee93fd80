# SPDX-License-Identifier: Apache-2.0
"""Start the processes of a test run and read their results."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[3]


def start(count: int, directory: pathlib.Path, *scenarios: str, devices: int = 2) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = []
    for index in range(count):
        arguments = [sys.executable, "-m", f"{__package__}.program", str(index), str(count), str(port), str(directory)]
        with (directory / f"log-{index}").open("w") as log:
            process = subprocess.Popen(
                [*arguments, *scenarios], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        processes.append(process)
    return processes


def finish(processes: list[subprocess.Popen], *, timeout_s: float) -> list[int]:
    """Return the exit codes; no process is left running."""
    deadline = time.monotonic() + timeout_s
    try:
        return [process.wait(max(1.0, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def answers(count: int, directory: pathlib.Path) -> list[dict]:
    paths = [directory / f"answer-{index}.json" for index in range(count)]
    return [json.loads(path.read_text()) if path.exists() else {} for path in paths]


def run(count: int, directory: pathlib.Path, *scenarios: str, devices: int = 2, timeout_s: float = 120) -> list[dict]:
    finish(start(count, directory, *scenarios, devices=devices), timeout_s=timeout_s)
    return answers(count, directory)


def kill_one(directory: pathlib.Path, victim: int, chance: random.Random) -> float:
    """Train with two processes in `directory / "killed"`; after one more step, kill one at a random moment.

    Returns:
        Seconds from the kill until the other process has ended.
    """
    run = directory / "killed"
    processes = start(2, directory, "killed")
    next_step, deadline = latest(run) + 1, time.monotonic() + 60
    while latest(run) < next_step and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(chance.uniform(0.0, 1.0))
    processes[victim].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    codes = finish(processes, timeout_s=60)
    assert codes[victim] == -signal.SIGKILL
    return time.monotonic() - killed_at


def latest(run: pathlib.Path) -> int:
    return max((int(path.name) for path in run.glob("[0-9]*")), default=0)
