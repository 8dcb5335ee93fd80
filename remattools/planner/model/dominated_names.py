# SPDX-License-Identifier: Apache-2.0
"""Names that no cheapest choice of a block needs, because saving others is at most as dear.

Sits on `dataflow_graph`. Most operations of a block form chains of equal size, of which only the last result is worth
saving. Without the others the integer program of `block_ilp` is several times faster, and its optimum is the same.
"""

from collections.abc import Mapping, Sequence

from .dataflow_graph import Graph


def find_undominated_names(
    graph: Graph, steps: Sequence[int], costs: Sequence[float], names: Mapping[str, Sequence[int]]
) -> list[str]:
    """Return the names that a cheapest choice may need, in order.

    A value is left out if, for no more bytes, one can save everything that is computed from it, or everything that it
    is computed from without cost. Names of several values stay, and no value is left out on their account.

    Args:
        graph: The block's graph.
        steps: Numbers of the forward steps that a backward pass could have to recompute.
        costs: Cycles of each forward step.
        names: For each name the numbers of its values.
    """
    readers: dict[int, list[int]] = {}
    for number in steps:
        for value in graph.forward[number].reads:
            if value in graph.producers:
                readers.setdefault(value, []).append(number)
    single: dict[int, str] = {}
    for name, values in names.items():
        if len(values) == 1:
            single.setdefault(values[0], name)
    # What is left out next may rely only on what is still there, so the order matters: values are visited as computed.
    remaining = dict(sorted(single.items(), key=lambda item: graph.producers[item[0]]))
    for value in list(remaining):
        results = {
            result
            for reader in readers.get(value, ())
            for result in graph.forward[reader].writes
            if result in graph.residuals or result in readers
        }
        if value not in graph.residuals and results and _is_as_cheap(graph, results, value, remaining):
            del remaining[value]
    for value in list(remaining):
        number = graph.producers[value]
        sources = {source for source in graph.forward[number].reads if source in graph.producers}
        if not costs[number] and sources and _is_as_cheap(graph, sources, value, remaining):
            del remaining[value]
    kept = set(remaining.values())
    return [name for name, values in names.items() if name in kept or len(values) > 1]


def _is_as_cheap(graph: Graph, values: set[int], value: int, remaining: Mapping[int, str]) -> bool:
    """Return whether `values` can all be saved, for at most the bytes of `value`."""
    return values <= remaining.keys() and graph.count_bytes(values) <= graph.bytes[value]
