# SPDX-License-Identifier: Apache-2.0
"""The built distributions, tried outside the checkout: `make package`."""
