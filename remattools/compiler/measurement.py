# SPDX-License-Identifier: Apache-2.0
"""What a compiler said of a program, as a value.

Pure data with its text forms; `compile` fills it in, `cache` stores it.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """One of the values that fill the memory at its fullest.

    Attributes:
        path: Module that computes it, "." where no module is known.
        name: What computes it there, or an argument's path.
        shape: As in `bfloat16[8,128]`.
        bytes: Size of all `count` values.
        count: How many equal ones were folded.
    """

    path: str
    name: str
    shape: str
    bytes: int
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutOfMemory:
    """A program that the compiler or the device refused for its size.

    Attributes:
        needed_bytes: What it would need; None where the message does not say. Rounded by the compiler.
        limit_bytes: What there is.
        message: The compiler's own words.
        largest: The largest values alive at the peak, from the program itself (before the compiler's fusions).
    """

    needed_bytes: int | None
    limit_bytes: int | None
    message: str
    largest: tuple[Allocation, ...] = ()

    @property
    def excess_bytes(self) -> int | None:
        """By how much it does not fit."""
        if self.needed_bytes is None or self.limit_bytes is None:
            return None
        return self.needed_bytes - self.limit_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """The compiler's own figures of one program, per device.

    Attributes:
        target: Name of the target it was compiled for.
        argument_bytes: Arguments.
        output_bytes: Results.
        alias_bytes: Results that reuse an argument's memory (donation).
        temp_bytes: Everything in between: what remat changes. The TPU's compiler counts its main memory only:
            temporaries that fit into the chip's own memory (VMEM) are in `peak_bytes` alone.
        peak_bytes: The most that is in use at once, as the compiler counts it: the CPU's leaves temporaries out,
            see `total_bytes`; the TPU's counts the chip's own memory too.
        host_temp_bytes: Temporaries in host memory, where offloading puts them.
        flops: Floating-point operations by the compiler's cost model, None where it has none.
        bytes_accessed: Bytes read and written, likewise.
        estimated_cycles: The TPU compiler's estimate of the time, loop bodies times their trip counts.
        compile_s: Seconds that compiling took, when it was compiled.
        step_s: Median seconds of a run (`run=True`).
        step_spread_s: Distance of the quartiles of these seconds.
        allocator_peak_bytes: The most that the device's allocator has handed out at once in this process so far
            (`run=True`); None where it does not count.
        out_of_memory: Set if it does not fit; then `temp_bytes` and `peak_bytes` are the compiler's rounded need
            (0 if it does not say), and the other costs are None.
        refusal: The compiler's own words, if it refused the program for another reason than its size (only as a row of
            `compare`, beside others that it took).
        notes: What to know before relying on the figures.
    """

    target: str
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int
    peak_bytes: int
    host_temp_bytes: int = 0
    flops: float | None = None
    bytes_accessed: float | None = None
    estimated_cycles: int | None = None
    compile_s: float = 0.0
    step_s: float | None = None
    step_spread_s: float | None = None
    allocator_peak_bytes: int | None = None
    out_of_memory: OutOfMemory | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether the program compiled, and ran if it was asked to."""
        return self.out_of_memory is None and self.refusal is None

    @property
    def total_bytes(self) -> int:
        """Arguments, results and temporaries together: what the device's main memory needs at most."""
        if self.out_of_memory is not None:
            return self.peak_bytes  # the compiler's need, arguments included
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @property
    def temporaries_in_peak(self) -> bool:
        """Whether `peak_bytes` counts the temporaries; the CPU compiler's does not, whatever the sizes are."""
        return not self.target.startswith("cpu") and self.peak_bytes >= self.temp_bytes

    @property
    def temporaries_on_chip(self) -> bool:
        """Whether temporaries lie in the chip's own memory, which `temp_bytes` leaves out: the peak tells more."""
        return self.fits and self.target.startswith("tpu") and self.peak_bytes > self.total_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` gives an equal value back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Measurement":
        """The value that `as_dict` was called on."""
        data = dict(data, notes=tuple(data["notes"]))
        if data["out_of_memory"] is not None:
            refused = dict(data["out_of_memory"])
            refused["largest"] = tuple(Allocation(**item) for item in refused["largest"])
            data["out_of_memory"] = OutOfMemory(**refused)
        return cls(**data)

    def __str__(self) -> str:
        lines = [f"target            {self.target}"]
        for field in ("argument", "output", "alias", "temp", "peak", "host_temp", "allocator_peak"):
            value = getattr(self, f"{field}_bytes")
            if value or field in ("argument", "output", "temp", "peak"):
                note = ""
                if field == "peak" and not self.temporaries_in_peak:
                    note = ", leaves temporaries out"
                if field == "temp" and self.temporaries_on_chip:
                    note = " in main memory; others fit into the chip's own, see peak"
                lines.append(f"{field:<18}{format_bytes(value)}{note}")
        lines.append(f"{'total':<18}{format_bytes(self.total_bytes)}")
        if self.flops is not None:
            lines.append(f"{'flops':<18}{format_count(self.flops)}")
        if self.bytes_accessed is not None:
            lines.append(f"{'bytes accessed':<18}{format_bytes(int(self.bytes_accessed))}")
        if self.estimated_cycles is not None:
            lines.append(f"{'estimated cycles':<18}{format_count(self.estimated_cycles)}")
        if self.step_s is not None:
            lines.append(
                f"{'step':<18}{self.step_s * 1e3:.3f} ms, quartiles {(self.step_spread_s or 0) * 1e3:.3f} apart"
            )
        lines.append(f"{'compile':<18}{self.compile_s:.2f} s")
        if self.out_of_memory is not None:
            lines += _format_out_of_memory(self.out_of_memory)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _format_out_of_memory(out_of_memory: OutOfMemory) -> list[str]:
    if out_of_memory.excess_bytes is None:
        lines = ["OUT OF MEMORY:", *(f"  {line}" for line in out_of_memory.message.splitlines()[:4])]
    else:
        lines = [
            f"OUT OF MEMORY: needs {format_bytes(out_of_memory.needed_bytes)} of {format_bytes(out_of_memory.limit_bytes)}, "
            f"{format_bytes(out_of_memory.excess_bytes)} too much"
        ]
    if out_of_memory.largest:
        lines.append("largest values at the peak:")
        lines += [
            f"  {format_bytes(a.bytes):>11}  {a.path}  {a.name}  {a.shape} x{a.count}" for a in out_of_memory.largest
        ]
    return lines


def format_bytes(count: int | None) -> str:
    """Bytes in the largest binary unit that leaves at least one, such as `1.50 GiB`."""
    if count is None:
        return "-"
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{int(size)} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def format_count(count: float | None) -> str:
    """A large number in thousands, such as `362.2 M`."""
    if count is None:
        return "-"
    size, units = float(count), ["", " k", " M", " G", " T", " P"]
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.4g}{units[0]}"


def strip_padding(table: str) -> list[str]:
    """The lines of a table without the blanks that fill them up."""
    return [line.rstrip() for line in table.rstrip().splitlines()]
