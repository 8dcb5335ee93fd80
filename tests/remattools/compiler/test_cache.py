# SPDX-License-Identifier: Apache-2.0
"""The cache: a repeated measurement is read, another program is compiled."""

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


def test_a_repeated_measurement_is_not_compiled_again(tmp_path):
    first = rt.measure(_square, X, cache=tmp_path)
    assert rt.measure(_square, X, cache=tmp_path) == first  # compile_s too, so nothing was compiled
    assert rt.measure(_square, X) != first  # control: without the cache it is
    assert len(list(tmp_path.iterdir())) == 1
    assert rt.measure(lambda x: jnp.sum(x @ x @ x), X, cache=tmp_path).flops != first.flops
    rt.measure(_square, jax.ShapeDtypeStruct((8, 8), jnp.float32), cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_environment_names_the_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("REMATTOOLS_CACHE", str(tmp_path))
    first = rt.measure(_square, X)
    assert rt.measure(_square, X) == first


def test_an_edited_entry_is_a_miss(tmp_path):
    first = rt.measure(_square, X, target="cpu", cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    data = json.loads(entry.read_text())
    data["measurement"]["argument_bytes"] = 5
    entry.write_text(json.dumps(data))
    again = rt.measure(_square, X, target="cpu", cache=tmp_path)
    assert again.argument_bytes == first.argument_bytes == 1024


def test_an_unwritable_directory_loses_only_the_cache(tmp_path, monkeypatch):
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.warns(rt.CacheWarning, match="not cached"):
        assert rt.measure(_square, X, target="cpu", cache=taken).argument_bytes == 1024
    full = tmp_path / "full"

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.os, "replace", no_space)
    with pytest.warns(rt.CacheWarning, match="No space left"):
        assert rt.measure(_square, X, target="cpu", cache=full).argument_bytes == 1024
    assert list(full.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", "null", "[" * 100_000, '{"target": 3}', '{"measurement": {}, "digest": ""}']
)
def test_a_damaged_entry_is_a_miss(tmp_path, content):
    first = rt.measure(_square, X, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    entry.write_text(content)
    again = rt.measure(_square, X, cache=tmp_path)
    assert again.temp_bytes == first.temp_bytes
    assert rt.measure(_square, X, cache=tmp_path) == again


def test_compiler_flags_and_versions_are_in_the_key(monkeypatch):
    device = jax.devices("cpu")[0]
    before = caching.compute_key("program", "cpu", device)
    assert caching.compute_key("program", "cpu", device) == before  # control
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    flagged = caching.compute_key("program", "cpu", device)
    monkeypatch.setattr(caching, "get_version", lambda name: "9.9")
    assert len({before, flagged, caching.compute_key("program", "cpu", device)}) == 3


def test_compiler_options_of_a_jitted_function_are_in_the_key(tmp_path):
    def count_entries(**options):
        rt.measure(jax.jit(_square, compiler_options=options), X, target="cpu", cache=tmp_path)
        return len(list(tmp_path.iterdir()))

    assert count_entries() == 1
    assert count_entries() == 1  # control
    assert count_entries(xla_cpu_enable_fast_math=True) == 2
    assert count_entries(xla_cpu_enable_fast_math=False) == 3


def test_jax_settings_are_in_the_key():
    device = jax.devices("cpu")[0]
    before = caching.compute_key("program", "cpu", device)
    with jax.enable_x64(not jax.config.jax_enable_x64):
        assert caching.compute_key("program", "cpu", device) != before


def test_an_out_of_memory_result_is_stored(tmp_path):
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


def test_the_user_cache_follows_xdg_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caching.open_user_cache().directory == tmp_path / "remattools"
