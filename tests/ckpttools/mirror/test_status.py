# SPDX-License-Identifier: Apache-2.0
"""How far a mirror is behind: a status is ok only if nothing is missing and the store answers."""

import pytest

import ckpttools as ct

URL = "s3://bucket/run"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param({"pending": (3, 4)}, "pending 3, 4", id="pending"),
        pytest.param({"missed": (1,)}, "missed 1", id="missed"),
        pytest.param({"damaged": (2,)}, "damaged 2", id="damaged"),
        pytest.param({"error": "no credentials", "failures": 3}, "no credentials", id="no answer"),
    ],
)
def test_a_status_with_trouble_is_not_ok_and_says_why(fields, text):
    status = ct.MirrorStatus(url=URL, copied=(5,), **fields)
    assert not status.ok
    assert str(status) == f"{URL}: 1 step(s) copied; {text}"


def test_a_status_without_trouble_is_ok():
    """Control."""
    assert ct.MirrorStatus(url=URL, copied=(1, 2)).ok
    assert ct.MirrorStatus(url=URL, failures=2).ok, "the last attempt succeeded"
    assert str(ct.MirrorStatus(url=URL)) == f"{URL}: 0 step(s) copied"


def test_a_status_as_data_holds_every_field():
    data = ct.MirrorStatus(url=URL, pending=(3,)).as_dict()
    assert data["ok"] is False
    assert (data["url"], data["pending"], data["error"]) == (URL, (3,), "")
