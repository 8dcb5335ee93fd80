# SPDX-License-Identifier: Apache-2.0
"""The examples that need other people's packages."""

import re

import pytest

from tests.examples.test_examples import run

pytestmark = pytest.mark.wild


def test_rules_on_tunix(tmp_path):
    output = run("rules_on_tunix.py", tmp_path)
    plain, ruled = (float(re.search(rf"^{name} +([\d.]+) MiB", output, re.M)[1]) for name in ("none", "llama3.toml"))
    assert ruled < 0.5 * plain
    assert output.rstrip().endswith("loss and gradients are the plain model's")
