# SPDX-License-Identifier: Apache-2.0
"""Two processes train one sharded model and save it together; then a single process resumes it.

    python examples/two_processes.py

Each process holds half of the weights, writes and digests that half, and process 0 commits when both have done so.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import ckpttools as ct


def build() -> dict:
    """Create a model and its optimizer, with matrices sharded over all devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @nnx.jit
    def create():
        model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        for part in (model, optimizer):
            state = nnx.state(part)
            shardings = jax.tree.map(lambda x: NamedSharding(mesh, P("data") if x.ndim == 2 else P()), state)
            nnx.update(part, jax.lax.with_sharding_constraint(state, shardings))
        return model, optimizer

    model, optimizer = create()
    return {"model": model, "optimizer": optimizer}


@nnx.jit
def update(model: nnx.Linear, optimizer: nnx.Optimizer, step: jax.Array) -> jax.Array:
    x = jax.random.normal(jax.random.key(step), (32, 16))
    loss, gradients = nnx.value_and_grad(lambda model: jnp.mean((model(x) - x[:, :8]) ** 2))(model)
    optimizer.update(model, gradients)
    return loss


def train(directory: pathlib.Path, total: int) -> None:
    """Train with the same loop as in a single process."""
    state = build()
    with ct.open(ct.CheckpointSpec(directory=directory, save=ct.EverySteps(5))) as ckpt:
        report = ckpt.restore(state)
        for step in ckpt.steps(total):
            loss = update(state["model"], state["optimizer"], step)
            ckpt.step(step, state)
    print(
        f"process {jax.process_index()} of {jax.process_count()}: restored {report.step}, trained to {total}, "
        f"loss {float(loss):.4f}, holds {state['model'].kernel.addressable_shards[0].data.shape} of (16, 8)",
        flush=True,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        directory = str(pathlib.Path(scratch, "run"))
        command = [sys.executable, __file__, "--directory", directory, "--port", str(port), "--index"]
        # One device per process, whatever the environment says about devices.
        environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        processes = [subprocess.Popen([*command, str(index)], env=environment) for index in range(2)]
        assert [process.wait(timeout=180) for process in processes] == [0, 0]
        print(ct.ls(directory))
        assert ct.verify(directory).ok
        train(pathlib.Path(directory), 20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.index is None:
        main()
    else:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{args.port}", num_processes=2, process_id=args.index)
        train(args.directory, 12)
        jax.distributed.shutdown()
