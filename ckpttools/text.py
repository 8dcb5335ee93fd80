# SPDX-License-Identifier: Apache-2.0
"""The health of a step as text: restores and `verify` describe damage in the same lines."""

from collections.abc import Sequence


def format_health(
    step: int, verdict: str, reason: str, *, leaves: Sequence[str], files: Sequence[str], origin: str = ""
) -> str:
    """Return one line on a step, and one more for each damaged leaf and file.

    Args:
        step: Number of the step.
        verdict: Its state in a word, such as "corrupt".
        reason: What is wrong; "" if nothing is.
        leaves: Paths of the damaged leaves.
        files: Paths of the damaged files.
        origin: Added after the number, such as " from the mirror".

    Example:
        >>> print(format_health(500, "corrupt", "a digest differs", leaves=["model.kernel"], files=[]))
        step 500: corrupt, a digest differs
            damaged leaf: model.kernel
    """
    # The reason is often the text of an error, which repeats the step and the verdict.
    reason = reason.removeprefix(f"step {step} is {verdict}: ")
    lines = [f"step {step}{origin}: {verdict}" + (f", {reason}" if reason else "")]
    lines += [f"    damaged leaf: {leaf}" for leaf in leaves]
    lines += [f"    damaged file: {file}" for file in files]
    return "\n".join(lines)
