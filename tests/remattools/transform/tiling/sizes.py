# SPDX-License-Identifier: Apache-2.0
"""How large the largest value of a program is."""

from remattools.jaxpr import jaxprs


def find_largest(jaxpr):
    """Bytes of the largest value that an equation computes, in the program and in those inside it."""
    sizes = [0]
    for equation in jaxprs.open_jaxpr(jaxpr).eqns:
        sizes += [jaxprs.count_aval_bytes(var.aval) for var in equation.outvars]
        sizes += [find_largest(below) for _, below in jaxprs.find_subjaxprs(equation)]
    return max(sizes)
