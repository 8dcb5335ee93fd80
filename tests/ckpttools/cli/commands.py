# SPDX-License-Identifier: Apache-2.0
"""Run a command and read what it prints; the states and damage that the tests of the commands share."""

import json

import jax.numpy as jnp

import ckpttools as ct
from ckpttools.cli import main


def state_at(step):
    return {
        "model": {"large": jnp.arange(4096.0) + step, "half": jnp.ones((2, 3), jnp.bfloat16)},
        "data": {"epoch": step},
    }


def spec_for(folder):
    return ct.CheckpointSpec(directory=folder, keep=ct.All())


def damage(run, step):
    path = max((p for p in (run / str(step)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def call(capsys, *argv):
    code = main.main([str(each) for each in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def as_json(capsys, *argv):
    code, out, _ = call(capsys, *argv, "--json")
    return code, json.loads(out)
