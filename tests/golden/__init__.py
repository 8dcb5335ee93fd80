# SPDX-License-Identifier: Apache-2.0
"""Runs that earlier versions wrote, one folder for each format; every later version has to read them all."""
