# SPDX-License-Identifier: Apache-2.0
"""A repeated measurement is read, another program is compiled."""

import errno
import json

import jax
import jax.numpy as jnp
import pytest

import remattools as rt
from remattools.compiler import cache as caching
from remattools.compiler.out_of_memory import Allocation, OutOfMemory
from remattools.compiler.report import Measurement

X = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def _square(x):
    return jnp.sum(x @ x)


def test_the_second_measurement_is_the_first(tmp_path):
    first = rt.measure(_square, X, cache=tmp_path)
    assert rt.measure(_square, X, cache=tmp_path) == first  # compile_s too, so nothing was compiled
    assert rt.measure(_square, X) != first  # control: without the cache it is
    assert len(list(tmp_path.iterdir())) == 1
    assert rt.measure(lambda x: jnp.sum(x @ x @ x), X, cache=tmp_path).flops != first.flops
    rt.measure(_square, jax.ShapeDtypeStruct((8, 8), jnp.float32), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path))
    first = rt.measure(_square, X)
    assert rt.measure(_square, X) == first


def test_an_entry_whose_figures_were_changed_is_no_hit(tmp_path):
    first = rt.measure(_square, X, target="cpu", cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    data = json.loads(entry.read_text())
    data["measurement"]["argument_bytes"] = 5
    entry.write_text(json.dumps(data))
    again = rt.measure(_square, X, target="cpu", cache=tmp_path)
    assert again.argument_bytes == first.argument_bytes == 1024


def test_a_folder_that_cannot_be_written_costs_the_cache_and_not_the_measurement(tmp_path, monkeypatch):
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.warns(rt.CacheWarning, match="not cached"):
        assert rt.measure(_square, X, target="cpu", cache=taken).argument_bytes == 1024
    folder = tmp_path / "full"

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.os, "replace", no_space)
    with pytest.warns(rt.CacheWarning, match="No space left"):
        assert rt.measure(_square, X, target="cpu", cache=folder).argument_bytes == 1024
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", "null", "[" * 100_000, '{"target": 3}', '{"measurement": {}, "digest": ""}']
)
def test_a_damaged_entry_is_no_hit(tmp_path, content):
    first = rt.measure(_square, X, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_text(content)
    again = rt.measure(_square, X, cache=tmp_path)
    assert again.temp_bytes == first.temp_bytes
    assert rt.measure(_square, X, cache=tmp_path) == again


def test_flags_of_the_compiler_belong_to_the_key(monkeypatch):
    device = jax.devices("cpu")[0]
    before = caching.compute_key("program", "cpu", device)
    assert caching.compute_key("program", "cpu", device) == before  # control
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    flagged = caching.compute_key("program", "cpu", device)
    monkeypatch.setattr(caching, "_get_version", lambda name: "9.9")
    assert len({before, flagged, caching.compute_key("program", "cpu", device)}) == 3


def test_options_of_a_jitted_function_belong_to_the_key(tmp_path):
    def compiled(**options):
        rt.measure(jax.jit(_square, compiler_options=options), X, target="cpu", cache=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert compiled() == 1
    assert compiled() == 1  # control
    assert compiled(xla_cpu_enable_fast_math=True) == 2
    assert compiled(xla_cpu_enable_fast_math=False) == 3


def test_settings_of_jax_belong_to_the_key():
    device = jax.devices("cpu")[0]
    before = caching.compute_key("program", "cpu", device)
    with jax.enable_x64(not jax.config.jax_enable_x64):
        assert caching.compute_key("program", "cpu", device) != before


def test_a_refusal_survives_storing(tmp_path):
    refused = OutOfMemory(
        needed_bytes=2, limit_bytes=1, message="m", largest=(Allocation(path="a", name="b", shape="c", bytes=2),)
    )
    measured = Measurement(
        target="t", argument_bytes=1, output_bytes=1, alias_bytes=0, temp_bytes=2, peak_bytes=2, out_of_memory=refused
    )
    store = caching.Cache(tmp_path)
    store.put("key", measured)
    assert store.get("key") == measured
    assert store.get("other") is None


def test_the_users_folder_follows_the_desktop_convention(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caching.open_user_cache().directory == tmp_path / "remattools"
