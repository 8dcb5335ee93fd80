# SPDX-License-Identifier: Apache-2.0
"""A mirror in the spec: a frozen value that can be written down, with no secret in it."""

import pytest

import ckpttools as ct

FULL = ct.Mirror(
    "s3://bucket/run",
    keep=ct.Latest(10) | ct.Best("val_loss", mode="min"),
    options={"endpoint_url": "http://127.0.0.1:9000", "anon": True, "retries": 2},
    verify="size",
    must_answer=False,
    wait_s=5.0,
)


@pytest.mark.parametrize("mirror", [None, "s3://bucket/run", FULL])
def test_a_spec_with_a_mirror_survives_a_file(mirror):
    spec = ct.CheckpointSpec(directory="run", mirror=mirror)
    assert ct.CheckpointSpec.from_toml(spec.to_toml()) == spec
    assert ct.CheckpointSpec.from_json(spec.to_json()) == spec
    assert hash(spec) == hash(ct.CheckpointSpec.from_toml(spec.to_toml()))


def test_an_address_is_enough():
    spec = ct.CheckpointSpec(directory="run", mirror="s3://bucket/run")
    assert spec.mirror == ct.Mirror("s3://bucket/run")
    text = '[checkpoint]\ndirectory = "run"\nmirror = "s3://bucket/run"\n'
    assert ct.CheckpointSpec.from_toml(text) == spec


def test_only_a_spec_with_a_mirror_has_another_fingerprint():
    plain = ct.CheckpointSpec(directory="run")
    assert "mirror" not in plain.to_toml()
    assert plain.fingerprint() != ct.CheckpointSpec(directory="run", mirror="s3://bucket/run").fingerprint()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"url": " "}, "is not an address"),
        ({"url": "sftp://me:hush@host/run"}, "holds a secret"),
        ({"url": "s3://b/r", "keep": 3}, "keep must be a Retention"),
        ({"url": "s3://b/r", "must_answer": 1}, "is not a bool"),
        ({"url": "s3://b/r", "verify": "maybe"}, "one of 'readback', 'size'"),
        ({"url": "s3://b/r", "wait_s": 0}, "above zero"),
        ({"url": "s3://b/r", "options": 3}, "options are names with values"),
        ({"url": "s3://b/r", "options": {"client_kwargs": {}}}, "cannot be written to a file"),
        ({"url": "s3://b/r", "options": {"secret": "x"}}, "is a secret"),
        ({"url": "s3://b/r", "options": {"key": "x"}}, "is a secret"),
        ({"url": "abfs://c/r", "options": {"connection_string": "AccountKey=x"}}, "is a secret"),
        ({"url": "abfs://c/r", "options": {"sas": "x"}}, "is a secret"),
        ({"url": "http://h/r", "options": {"auth": "u:p"}}, "is a secret"),
        ({"url": "https://h/run?sv=1&sig=x"}, "holds a secret"),
    ],
)
def test_what_cannot_be_honoured_is_refused(arguments, text):
    with pytest.raises(ct.SpecError, match=text):
        ct.Mirror(**arguments)


def test_errors_of_a_file_name_the_line():
    with pytest.raises(ct.SpecFileError, match="line 5"):
        ct.CheckpointSpec.from_toml('[checkpoint]\ndirectory = "run"\n[checkpoint.mirror]\nurl = "s3://b/r"\nkep = 3\n')
    text = '[checkpoint]\ndirectory = "run"\nmirror = { url = "s3://b/r", keep = { lates = 3 } }\n'
    with pytest.raises(ct.SpecFileError, match=r"'lates' is not known under 'keep'.*\n.*\n.*latest"):
        ct.CheckpointSpec.from_toml(text)
    with pytest.raises(ct.SpecError, match="is an address or a Mirror"):
        ct.CheckpointSpec(directory="run", mirror=3)
    with pytest.raises(ct.SpecError, match="mirror="):
        ct.CheckpointSpec(directory="s3://bucket/run")
