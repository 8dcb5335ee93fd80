# SPDX-License-Identifier: Apache-2.0
"""A Gaussian process that corrects predictions by the measurements of some of them.

Knows nothing of plans: it takes features, predictions and measurements, and returns means and standard deviations.

The error of the predictions is modelled as a sum of a constant, a wrong rate for each feature, and a smooth rest, which
is alike where the features are. All sizes below are shares of the largest measurement.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

# Standard deviations: of a feature's rate, of the smooth rest, and of a measurement that nothing explains. The constant
# is a variance, so large that one measurement determines it.
_CONSTANT, _RATE, _REST, _NOISE = 100.0, 0.5, 0.05, 1e-3
# The squared distance of features at which the smooth residual decorrelates.
_REST_SCALE = 0.05
# The same for the second features: of a rate, and of a rest that is alike at a squared distance of 1.
_SECOND_RATE, _SECOND_REST = 0.1, 0.2
# The scale is at least this share of the largest prediction. Where measurements are near zero, as where everything lies
# in a chip's on-chip memory, the predictions are off by more than shares of them.
_MIN_SCALE_SHARE = 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Surrogate:
    """A Gaussian process over items with features.

    Attributes:
        features: Of each item, shape (items, features), each at most about 1 in size.
        second_features: Features that are expected to explain less, shape (items, second features); None for none.
    """

    features: np.ndarray
    second_features: np.ndarray | None = None

    def correct(self, predictions: np.ndarray, measurements: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
        """Return what is expected of each item, given the measurements of some.

        Args:
            predictions: Of all items, shape (items,), in any unit.
            measurements: Measured values by the numbers of the items, in the same unit; at least one.

        Returns:
            Means and standard deviations, both of shape (items,) and in the unit of the predictions; a measured item
            has its measurement and 0.
        """
        measured = np.array(list(measurements))
        values = np.array([measurements[number] for number in measured])
        scale = max(np.abs(values).max(), _MIN_SCALE_SHARE * np.abs(predictions[measured]).max(), 1.0)
        cross = self._compute_kernel(np.arange(len(predictions)), measured)
        among = self._compute_kernel(measured, measured) + _NOISE**2 * np.eye(len(measured))
        errors = (values - predictions[measured]) / scale
        solved = np.linalg.solve(among, np.column_stack([errors, cross.T]))
        mean = predictions + scale * (cross @ solved[:, 0])
        variance = self._compute_prior_variance() - (cross * solved[:, 1:].T).sum(axis=1)
        std = scale * np.sqrt(np.maximum(variance, 0.0))
        mean[measured], std[measured] = values, 0.0
        return np.asarray(mean), np.asarray(std)

    def _compute_prior_variance(self) -> np.ndarray:
        variance = _CONSTANT + _RATE**2 * (self.features**2).sum(axis=1) + _REST**2
        if self.second_features is not None:
            variance += _SECOND_RATE**2 * (self.second_features**2).sum(axis=1) + _SECOND_REST**2
        return np.asarray(variance)

    def _compute_kernel(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the covariances of two sets of items, shape (left, right)."""
        a, b = self.features[left], self.features[right]
        kernel = _CONSTANT + _RATE**2 * (a @ b.T) + _REST**2 * np.exp(-_compute_squared_distances(a, b) / _REST_SCALE)
        if self.second_features is not None:
            a, b = self.second_features[left], self.second_features[right]
            kernel += _SECOND_RATE**2 * (a @ b.T) + _SECOND_REST**2 * np.exp(-_compute_squared_distances(a, b))
        return np.asarray(kernel)


def _compute_squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(((a[:, None] - b[None]) ** 2).sum(axis=-1))
