# SPDX-License-Identifier: Apache-2.0
"""A real S3 server on loopback whose connections can be cut, and a mirror on the local disk."""

import pytest

import ckpttools as ct
from tests.ckpttools import stores


@pytest.fixture(scope="module")
def s3():
    server = stores.S3()
    yield server
    server.stop()


@pytest.fixture
def way(s3, monkeypatch):
    """A way to the server that can be cut, with credentials in the environment as the driver finds them."""
    for name, value in {**stores.USER, "AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    way = stores.Way(s3.port)
    yield way
    way.close()


@pytest.fixture
def on_s3(way, tmp_path, request):
    options = {"endpoint_url": f"http://127.0.0.1:{way.port}"}
    mirror = ct.Mirror(f"s3://bucket/{request.node.name}", options=options, wait_s=20)
    return ct.CheckpointSpec(directory=tmp_path / "run", mirror=mirror)


@pytest.fixture
def on_disk(tmp_path):
    mirror = ct.Mirror(f"file://{tmp_path / 'nas' / 'run'}", wait_s=20)
    return ct.CheckpointSpec(directory=tmp_path / "run", mirror=mirror)
