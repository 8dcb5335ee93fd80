# SPDX-License-Identifier: Apache-2.0
"""Where a run's steps are copied to, as a frozen value of the spec.

Pure: the address imports nothing, and nothing is contacted before a run is opened. Secrets are refused, because a spec
is written into files, logs and fingerprints; every store reads them from its environment.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

from ..errors import SpecError
from .checks import require_choice, require_positive
from .retention import Retention

_SECRET = re.compile(
    r"secret|passw|token|credential|connection_string|account_key|(^|[_-])(pass|key|auth|sas|sig|signature)$",
    re.IGNORECASE,
)
_WITH_USER = re.compile(r"://[^/@]*:[^/@]*@")

type Option = str | int | float | bool


@dataclasses.dataclass(frozen=True)
class Mirror:
    """A second place for a run's steps, at any address that fsspec supports.

    Attributes:
        url: Address of a directory for this run alone: "s3://bucket/run", "file:///mnt/nas/run", ...
        keep: What to keep there; None for what the run keeps.
        options: Options of the store, such as `{"endpoint_url": "http://..."}`; no secrets.
        verify: "readback" reads every copied file back and compares its digest; "size" compares sizes only. A
            restore compares digests in any case.
        must_answer: Whether `restore` in a directory without steps raises if the store does not answer. Otherwise
            training starts from scratch although the run may be there.
        wait_s: How long `close` waits for copies, in seconds; the next session copies the rest.

    Example:
        >>> import ckpttools as ct
        >>> mirror = ct.Mirror("s3://bucket/run", keep=ct.Latest(10), options={"endpoint_url": "http://127.0.0.1:9000"})
        >>> mirror.store_options
        {'endpoint_url': 'http://127.0.0.1:9000'}
    """

    url: str
    _: dataclasses.KW_ONLY
    keep: Retention | None = None
    options: Mapping[str, Option] | tuple[tuple[str, Option], ...] = ()
    verify: Literal["readback", "size"] = "readback"
    must_answer: bool = True
    wait_s: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.url, str) or not self.url.strip():
            raise SpecError(
                what=f"Mirror({self.url!r}) is not an address.",
                why="copies of the steps are written below it.",
                fix='Mirror("s3://bucket/run")',
            )
        if _WITH_USER.search(self.url) or any(map(_SECRET.search, _list_query_names(self.url))):
            raise SpecError(
                what="the address of the mirror holds a secret.",
                why="a spec is written into files and logs.",
                fix="leave it out; fsspec reads it from the environment or from ~/.config/fsspec.",
            )
        if self.keep is not None and not isinstance(self.keep, Retention):
            raise SpecError(
                what=f"Mirror(keep={self.keep!r}) is of the wrong kind.",
                why="keep must be a Retention, or None for what the run keeps.",
                fix="Mirror(url, keep=Latest(10))",
            )
        if not isinstance(self.must_answer, bool):
            raise SpecError(
                what=f"Mirror(must_answer={self.must_answer!r}) is not a bool.",
                why="must_answer is switched on or off.",
                fix="Mirror(url, must_answer=True)",
            )
        require_choice("Mirror", "verify", self.verify, ("readback", "size"))
        require_positive("Mirror", "wait_s", self.wait_s)
        object.__setattr__(self, "options", _freeze_options(self.options))

    @property
    def store_options(self) -> dict[str, Option]:
        """Return the options as keyword arguments."""
        return dict(self.options)


def _list_query_names(url: str) -> list[str]:
    """Return the names of the parameters behind the question mark of an address, such as a signature."""
    return [part.partition("=")[0] for part in url.partition("?")[2].split("&")]


def _freeze_options(options: Any) -> tuple[tuple[str, Option], ...]:
    """Return options in a form that can be compared and hashed."""
    try:
        pairs = sorted(dict(options).items())
    except (TypeError, ValueError) as error:
        raise SpecError(
            what=f"Mirror(options={options!r}) cannot be read.",
            why="options are names with values.",
            fix='Mirror(url, options={"endpoint_url": "http://127.0.0.1:9000"})',
        ) from error
    for name, value in pairs:
        if not isinstance(name, str) or not name.isidentifier() or not isinstance(value, str | int | float | bool):
            raise SpecError(
                what=f"Mirror(options={{{name!r}: {value!r}}}) cannot be written to a file.",
                why="an option is a name with a string, a number or a truth value.",
                fix="put nested options of a store into ~/.config/fsspec.",
            )
        if _SECRET.search(name):
            raise SpecError(
                what=f"the option {name!r} of the mirror is a secret.",
                why="a spec is written into files and logs.",
                fix="leave it out; stores read AWS_SECRET_ACCESS_KEY and the like, or ~/.config/fsspec.",
            )
    return tuple(pairs)


def as_mirror(value: Any) -> Mirror | None:
    """Return the value of `CheckpointSpec(mirror=...)`, an address or a `Mirror`, as a `Mirror`."""
    if value is None or isinstance(value, Mirror):
        return value
    if isinstance(value, str):
        return Mirror(value)
    raise SpecError(
        what=f"CheckpointSpec(mirror={value!r}) is of the wrong kind.",
        why="it is an address or a Mirror.",
        fix='mirror="s3://bucket/run", or mirror=Mirror("s3://bucket/run", keep=Latest(10))',
    )
