# SPDX-License-Identifier: Apache-2.0
"""A user's program: the results of both packages and their attributes have types."""

import pathlib
from typing import Any, assert_type

import jax
import optax
from flax import nnx

import ckpttools as ct
import remattools as rt


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x)


def loss(model: Model, x: jax.Array) -> jax.Array:
    return (model(x) ** 2).mean()


def choose_rules(model: Model, x: jax.Array) -> Model:
    rules = rt.Rules({"layers.*": "nothing_saveable"})
    assert_type(rt.explain(model, rules).rows[0].path, str)
    assert_type(rt.measure(loss, model, x).temp_bytes, int)
    assert_type(rt.measure(loss, model, x).flops, float | None)
    residuals = rt.residuals(loss, model, x)
    assert_type(residuals.total_bytes, int)
    assert_type(residuals.rows[0], rt.Residual)
    assert_type(residuals.rows[0].shape, tuple[int, ...])
    assert_type(rt.timeline(loss, model, x).peak_bytes, int)
    assert_type(rt.check(loss, model, x).ok, bool)
    row = rt.compare(loss, model, x, candidates={"none": {}}).rows[0]
    assert_type(row.measurement, rt.Measurement)
    assert_type(row.memory_ratio, float | None)
    frontier = rt.frontier(loss, model, x)
    assert_type(frontier, rt.Frontier)
    plan = frontier.plan("16 GiB")
    assert_type(plan, rt.Plan)
    assert_type(plan.rules, rt.Rules)
    assert_type(plan.predicted.bytes if plan.predicted else None, int | None)
    assert_type(plan.measured.fits, bool)
    assert_type(plan.points[0].link_cycles, float)
    assert_type(plan.budget_bytes, int | None)
    assert_type(rt.find_target("cpu").platform, str)
    applied = rt.apply(model, plan.rules)
    assert_type(applied, Model)
    return applied


def write_rules() -> rt.Rules:
    by_name = rt.Remat("dots_saveable", save=["attn.qkv"])
    assert_type(by_name.save, tuple[str, ...])
    by_value = rt.Remat(rt.policies.dots_saveable | rt.policies.save_only_these_names("qkv"), offload=("mlp",))
    by_callable = rt.Remat(policy=jax.checkpoint_policies.nothing_saveable, group="sqrt")
    by_function = rt.Remat(policy=lambda primitive, *_, **__: primitive.name == "sin", methods=["encode"])
    either = rt.policies.save_from_both_policies("dots_saveable", jax.checkpoint_policies.nothing_saveable)
    return rt.Rules({"a": by_name, "b": by_value, "c": by_callable, "d": by_function, "e": either, "f": rt.Remat()})


def train(model: Model, optimizer: "nnx.Optimizer[Model]", directory: str) -> int:
    spec = ct.CheckpointSpec(
        directory=directory, save=ct.EverySteps(500), keep=ct.Latest(3) | ct.Best("loss", mode="min")
    )
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    with ct.open(spec) as ckpt:
        assert_type(ckpt, ct.Session)
        report = ckpt.restore(state)
        assert_type(report, ct.RestoreReport)
        assert_type(report.step, int | None)
        assert_type(report.candidates[0].moved_to, pathlib.Path | None)
        assert_type(report.metrics["loss"], float)
        assert_type(report.altered, tuple[ct.AlteredLeaf, ...])
        for step in ckpt.steps(1000):
            assert_type(step, int)
            match ckpt.step(step, state, metrics={"loss": 0.1}):
                case ct.Saved(path=path, deleted=deleted):
                    assert_type(path, pathlib.Path)
                    assert_type(deleted, tuple[int, ...])
                case ct.Started(finished=finished):
                    assert_type(finished, ct.Saved | None)
                case ct.Skipped(reason=reason):
                    assert_type(reason, str)
                case ct.Failed(error=error):
                    assert_type(error.fix, str)
        assert_type(ckpt.latest_step(), int | None)
        assert_type(ckpt.preempted, bool)
        return ckpt.latest_step() or 0


def inspect(directory: str) -> bool:
    assert_type(ct.ls(directory)[0], ct.ListedStep)
    assert_type(ct.ls(directory)[0].metrics, dict[str, float])
    assert_type(ct.show(directory).leaves[0].shape, tuple[int, ...])
    assert_type(ct.diff(directory, directory).changed[0].max_abs, float | None)
    assert_type(ct.repair(directory, dry_run=True).repairs[0].done, str)
    assert_type(ct.prune(directory, ct.Latest(1), dry_run=True)[0].reason, str)
    assert_type(ct.empty_quarantine(directory), tuple[str, ...])
    assert_type(ct.preview(directory, {}).read_bytes, int)
    assert_type(ct.load(directory, {}).seconds, float)
    assert_type(ct.export_safetensors(directory, "model.safetensors"), tuple[str, ...])
    report = ct.verify(directory)
    assert_type(report.steps[0].leaves, tuple[str, ...])
    return report.ok


def optimize(model: Model) -> "nnx.Optimizer[Model]":
    return nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)
