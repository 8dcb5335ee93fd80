# SPDX-License-Identifier: Apache-2.0
"""How bytes reach the disk and are verified: what cannot be honoured is refused."""

import pytest

import ckpttools as ct


@pytest.mark.parametrize(
    ("min_free", "needed"),
    [("2x", 2000), ("1.5x", 1500), ("0.1x", 1000), (0, 1000), (5000, 5000)],
)
def test_min_free_determines_the_required_bytes(min_free, needed):
    assert ct.Storage(min_free=min_free).compute_required_bytes(1000) == needed


@pytest.mark.parametrize(
    ("kind", "fields", "text"),
    [
        pytest.param(ct.Storage, {"asynchronous": 1}, "is not a bool", id="asynchronous"),
        pytest.param(ct.Storage, {"compression": "zstd"}, "is not a bool", id="compression"),
        pytest.param(ct.Storage, {"min_free": "2"}, "min_free='2'", id="a factor without x"),
        pytest.param(ct.Storage, {"min_free": -1}, "min_free=-1", id="negative bytes"),
        pytest.param(ct.Storage, {"min_free": True}, "min_free=True", id="a bool as bytes"),
        pytest.param(ct.Storage, {"min_free": 1.5}, "min_free=1.5", id="a float"),
        pytest.param(ct.Storage, {"when_full": "delete"}, "when_full='delete'", id="when_full"),
        pytest.param(ct.Storage, {"timeout_s": 0}, "timeout_s=0", id="no time"),
        pytest.param(ct.Integrity, {"digest": "md5"}, "digest='md5'", id="digest"),
        pytest.param(ct.Integrity, {"verify": "never"}, "verify='never'", id="verify"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind, fields, text):
    with pytest.raises(ct.SpecError) as caught:
        kind(**fields)
    assert text in str(caught.value)
    assert kind.__name__ in caught.value.fix
    kind()  # control: the defaults are legal


def test_storage_and_integrity_take_keywords_only():
    with pytest.raises(TypeError):
        ct.Storage(True)
    with pytest.raises(TypeError):
        ct.Integrity("sha256")
