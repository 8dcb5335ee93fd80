# SPDX-License-Identifier: Apache-2.0
"""Cycles in compiled HLO: a loop's body is multiplied by its trip count."""

import pytest

from remattools.compiler.hlo.cycles import estimate_cycles
from remattools.compiler.hlo.program import parse_program

HLO = """HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %step = s32[]{:T(128)} constant(STEP)
  %arg = (s32[], f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %next = s32[]{:T(128)} add(%i, %step)
  %x = f32[8] get-tuple-element(%arg), index=1
  %y = f32[8] fusion(%x), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (s32[], f32[8]) tuple(%next, %y)
}

%condition (arg: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %arg = (s32[], f32[8]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=DIRECTION
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8] parameter(0)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8] parameter(0)
  %zero = s32[]{:T(128)} constant(1)
  %start = s32[]{:T(128)} copy(%zero)
  %init = (s32[], f32[8]) tuple(%start, %x)
  %loop = (s32[], f32[8]) while(%init), condition=%condition, body=%bodyTRIPS
  %branch = f32[8] conditional(%x), branch_computations={%cheap, %costly}
  ROOT %r = f32[8] negate(%x), backend_config={"window_config":{"estimated_cycles":"5"}}
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8] negate(%p), backend_config={"window_config":{"estimated_cycles":"20"}}
}

%costly (p: f32[8]) -> f32[8] {
  ROOT %n = f32[8] negate(%p), backend_config={"window_config":{"estimated_cycles":"30"}}
}
"""


def _make_hlo(step="1", direction="LT", trips=""):
    return HLO.replace("STEP", step).replace("DIRECTION", direction).replace("TRIPS", trips)


@pytest.mark.parametrize(
    ("hlo", "trips"),
    [
        pytest.param(_make_hlo(), 6, id="from 1 below 7"),
        pytest.param(_make_hlo(step="2"), 3, id="in steps of 2"),
        pytest.param(_make_hlo(trips=', backend_config={"known_trip_count":{"n":"9"}}'), 9, id="written down"),
    ],
)
def test_bodies_count_per_trip_and_branches_by_the_costliest(hlo, trips):
    found = estimate_cycles(parse_program(hlo))
    assert (found.total, found.unknown_loops) == (trips * 100 + 30 + 5, ())


def test_a_loop_with_unknown_trip_count_counts_once():
    found = estimate_cycles(parse_program(_make_hlo(direction="NE")))
    assert (found.total, found.unknown_loops) == (135, ("loop",))


def test_hlo_without_estimates_has_none():
    assert estimate_cycles(parse_program("HloModule m\nENTRY %main (x: f32[8]) -> f32[8] {\n}\n")) is None


@pytest.mark.parametrize(
    ("estimate", "operations"),
    [
        pytest.param("9223372036854775807", ("r",), id="the compiler has no estimate"),
        pytest.param("1152921504608797013", ("r",), id="a part of an estimate plus 2^60"),
        pytest.param("5", (), id="control"),
    ],
)
def test_a_sentinel_is_unknown_and_not_summed(estimate, operations):
    hlo = _make_hlo().replace('"estimated_cycles":"5"', f'"estimated_cycles":"{estimate}"')
    found = estimate_cycles(parse_program(hlo))
    assert found.unknown_operations == operations
    assert found.total == 630 + (0 if operations else 5)
