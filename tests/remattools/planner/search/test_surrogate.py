# SPDX-License-Identifier: Apache-2.0
"""The surrogate corrects predictions by measurements, and knows how far to trust them."""

import numpy as np
import pytest

from remattools.planner.search import surrogate
from remattools.planner.search.surrogate import Surrogate

FEATURES = np.linspace(0, 1, 11)[:, None]
PREDICTIONS = 1000.0 + 100.0 * FEATURES[:, 0]


def test_a_measurement_is_returned_as_it_is() -> None:
    mean, std = Surrogate(FEATURES).correct(PREDICTIONS, {3: 700.0})
    assert (mean[3], std[3]) == (700.0, 0.0)
    assert (np.delete(std, 3) > 0).all()


def test_one_measurement_shifts_all_predictions() -> None:
    mean, _ = Surrogate(FEATURES).correct(PREDICTIONS, {5: PREDICTIONS[5] + 50})
    np.testing.assert_allclose(mean - PREDICTIONS, 50, rtol=0.05)


def test_several_measurements_correct_the_rate_of_a_feature() -> None:
    truth = 1000.0 + 300.0 * FEATURES[:, 0]
    mean, _ = Surrogate(FEATURES).correct(PREDICTIONS, {number: truth[number] for number in (0, 5, 10)})
    np.testing.assert_allclose(mean, truth, rtol=0.01)
    assert np.abs(PREDICTIONS - truth).max() > 100  # control


def test_uncertainty_grows_with_the_distance_from_measurements() -> None:
    _, std = Surrogate(FEATURES).correct(PREDICTIONS, {0: 1000.0, 1: 1010.0})
    assert std[2] < std[6] < std[10]


def test_second_features_add_uncertainty_where_they_differ() -> None:
    second = np.zeros((11, 1))
    second[10] = 1.0
    _, plain = Surrogate(FEATURES).correct(PREDICTIONS, {9: 1090.0})
    _, more = Surrogate(FEATURES, second).correct(PREDICTIONS, {9: 1090.0})
    assert more[10] > 1.5 * plain[10]
    assert more[8] == pytest.approx(plain[8])  # control: no difference there


def test_measurements_near_zero_do_not_remove_all_uncertainty(monkeypatch: pytest.MonkeyPatch) -> None:
    """In on-chip memory all programs take 0 bytes, whatever was predicted."""
    _, std = Surrogate(FEATURES).correct(PREDICTIONS, {0: 0.0, 10: 0.0})
    assert std.max() > 1e-3 * PREDICTIONS.max()
    monkeypatch.setattr(surrogate, "_MIN_SCALE_SHARE", 0.0)
    _, std = Surrogate(FEATURES).correct(PREDICTIONS, {0: 0.0, 10: 0.0})
    assert std.max() < 1e-3 * PREDICTIONS.max()  # control
