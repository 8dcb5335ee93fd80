# SPDX-License-Identifier: Apache-2.0
"""What the compiler reports on a program, as a value: memory, operations and cycles.

Nothing is estimated here: every number comes from the compiler, the clock or the allocator.
"""

import dataclasses
from typing import Any

from ..text import format_bytes
from .hlo.cycles import estimate_cycles
from .hlo.live_buffers import LiveBuffer, format_live_buffers, read_live_buffers
from .hlo.program import parse_program
from .out_of_memory import Allocation, OutOfMemory
from .targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Measurement:
    """The compiler's report on one program, per device; `str()` is a table.

    Attributes:
        target: Name of the target it was compiled for.
        argument_bytes: Size of the arguments.
        output_bytes: Size of the results.
        alias_bytes: Size of the results that reuse an argument's memory (donation).
        temp_bytes: Size of everything in between, which is what remat changes. The TPU compiler counts main memory
            only: temporaries in on-chip memory (VMEM) are in `peak_bytes` alone.
        peak_bytes: Most bytes in use at once, as the compiler counts them. The CPU compiler leaves temporaries out (use
            `total_bytes`); the TPU compiler includes on-chip memory and `host_temp_bytes`.
        host_temp_bytes: Size of the temporaries in host memory, where offloading puts them.
        flops: Floating-point operations in the compiler's cost model; None if it has none.
        bytes_accessed: Bytes read and written in the compiler's cost model; None if it has none.
        estimated_cycles: The TPU compiler's estimate of the time, loop bodies times their trip counts; else None.
        compile_s: Seconds the compile took; of the original compile if the measurement comes from a cache.
        step_s: Median seconds of a run; None without `run=True`.
        step_spread_s: Interquartile range of these seconds; None without `run=True`.
        allocator_peak_bytes: Most bytes the device's allocator has handed out at once in this process so far; None
            without `run=True`, or if the allocator does not count.
        out_of_memory: Set if the program runs out of memory. Then `temp_bytes` and `peak_bytes` are the bytes it needs
            as rounded by the compiler (0 if unknown), and the other costs are None.
        refusal: The compiler's message if it refused the program for another reason. Only in rows of `compare`, next
            to candidates that compiled.
        live: The temporaries that are live at the peak of the compiled program, by module and operation, largest first.
            `explained_share` says how much of `temp_bytes` they account for.
        notes: Caveats to read before relying on the numbers.

    Example:
        >>> import jax, jax.numpy as jnp, remattools as rt
        >>> x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
        >>> measurement = rt.measure(lambda x: jnp.sum(x @ x), x, target="cpu")
        >>> measurement.fits, measurement.argument_bytes, measurement.total_bytes >= measurement.temp_bytes
        (True, 262144, True)
        >>> rt.Measurement.from_dict(measurement.as_dict()) == measurement
        True
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
    live: tuple[LiveBuffer, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def explained_bytes(self) -> int:
        """Bytes of the live buffers at the peak."""
        return sum(row.bytes for row in self.live)

    @property
    def fragmentation_bytes(self) -> int:
        """Bytes that lie unused between buffers: what the TPU compiler's temporaries take beyond its own peak.

        0 for other targets, whose compilers do not say.
        """
        if not self.fits or not self.target.startswith("tpu"):
            return 0
        return min(max(self.total_bytes - self.peak_bytes, 0), self.temp_bytes)

    @property
    def unexplained_bytes(self) -> int:
        """What `temp_bytes` is beyond live buffers and fragmentation; negative if these are too much."""
        return self.temp_bytes - self.explained_bytes - self.fragmentation_bytes

    @property
    def explained_share(self) -> float | None:
        """Share of `temp_bytes` that live buffers and fragmentation account for; None if the program did not compile.

        Too much counts against it like too little.
        """
        if not self.fits:
            return None
        if not self.temp_bytes:
            return 1.0 if not self.explained_bytes else 0.0
        return max(1 - abs(self.unexplained_bytes) / self.temp_bytes, 0.0)

    @property
    def fits(self) -> bool:
        """Whether the program compiled, and ran if it was asked to."""
        return self.out_of_memory is None and self.refusal is None

    @property
    def total_bytes(self) -> int:
        """Arguments, results and temporaries: an upper bound of the device's main memory in use."""
        if self.out_of_memory is not None:
            return self.peak_bytes  # includes the arguments
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @property
    def temporaries_in_peak(self) -> bool:
        """Whether `peak_bytes` counts the temporaries; the CPU compiler's never does."""
        # The TPU compiler's peak has no gaps between buffers, so it may be below the temporaries.
        return self.target.startswith("tpu") or (
            not self.target.startswith("cpu") and self.peak_bytes >= self.temp_bytes
        )

    @property
    def temporaries_on_chip(self) -> bool:
        """Whether some temporaries are in a TPU's on-chip memory, which only `peak_bytes` counts."""
        return self.fits and self.target.startswith("tpu") and self.device_peak_bytes > self.total_bytes

    @property
    def device_peak_bytes(self) -> int:
        """`peak_bytes` without temporaries in host memory, which the TPU compiler counts."""
        if not self.host_temp_bytes or not self.target.startswith("tpu"):
            return self.peak_bytes
        # The host's temporaries are not live all the time: at another moment the device may hold more.
        return max(self.peak_bytes - self.host_temp_bytes, min(self.peak_bytes, self.total_bytes))

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Measurement":
        """Return the measurement whose `as_dict` gave `data`."""
        live = tuple(LiveBuffer(**row) for row in data["live"])
        data = dict(data, notes=tuple(data["notes"]), live=live)
        if data["out_of_memory"] is not None:
            refused = dict(data["out_of_memory"])
            refused["largest"] = tuple(Allocation(**item) for item in refused["largest"])
            data["out_of_memory"] = OutOfMemory(**refused)
        return cls(**data)

    def __repr__(self) -> str:
        # Without the fields that are at their defaults, most of which say that something was not measured.
        fields = [field for field in dataclasses.fields(self) if field.name != "live"]  # as long as a program
        shown = [(field.name, getattr(self, field.name), field.default) for field in fields]
        return f"Measurement({', '.join(f'{name}={value!r}' for name, value, default in shown if value != default)})"

    def __str__(self) -> str:
        lines = [f"target            {self.target}"]
        for field in ("argument", "output", "alias", "temp", "peak", "host_temp", "allocator_peak"):
            value = getattr(self, f"{field}_bytes")
            if value or field in ("argument", "output", "temp", "peak"):
                note = ""
                if field == "peak" and not self.temporaries_in_peak:
                    note = " without temporaries"
                if field == "temp" and self.temporaries_on_chip:
                    note = " in main memory; more in on-chip memory, see peak"
                lines.append(f"{field:<18}{format_bytes(value)}{note}")
        lines.append(f"{'total':<18}{format_bytes(self.total_bytes)}")
        if self.flops is not None:
            lines.append(f"{'flops':<18}{format_count(self.flops)}")
        if self.bytes_accessed is not None:
            lines.append(f"{'bytes accessed':<18}{format_bytes(int(self.bytes_accessed))}")
        if self.estimated_cycles is not None:
            lines.append(f"{'estimated cycles':<18}{format_count(self.estimated_cycles)}")
        if self.step_s is not None:
            spread_ms = (self.step_spread_s or 0) * 1e3
            lines.append(f"{'step':<18}{self.step_s * 1e3:.3f} ms, interquartile range {spread_ms:.3f} ms")
        lines.append(f"{'compile':<18}{self.compile_s:.2f} s")
        if self.live:
            lines += format_live_buffers(self.live, self.temp_bytes, self.fragmentation_bytes)
        if self.out_of_memory is not None:
            lines += _format_out_of_memory(self.out_of_memory)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def _format_out_of_memory(reason: OutOfMemory) -> list[str]:
    if reason.excess_bytes is None:
        lines = ["OUT OF MEMORY:", *(f"  {line}" for line in reason.message.splitlines()[:4])]
    else:
        needed, limit = format_bytes(reason.needed_bytes), format_bytes(reason.limit_bytes)
        lines = [f"OUT OF MEMORY: needs {needed} of {limit}, {format_bytes(reason.excess_bytes)} too much"]
    if reason.largest:
        lines.append("largest values at the peak of the traced program:")
        lines += [f"  {format_bytes(a.bytes):>11}  {a.path}  {a.name}  {a.shape} x{a.count}" for a in reason.largest]
    return lines


def format_count(count: float | None) -> str:
    """Format a large number in powers of 1000, such as `362.2 M`."""
    if count is None:
        return "-"
    size, units = float(count), ["", " k", " M", " G", " T", " P"]
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.4g}{units[0]}"


def read_measurement(compiled: Any, target: Target, compile_s: float) -> Measurement:
    """Read what the compiler reports on a compiled program.

    Args:
        compiled: The compiled stage of `jax.jit`.
        target: What it was compiled for.
        compile_s: Seconds that took.
    """
    memory = compiled.memory_analysis()
    costs = _read_costs(compiled)
    program = parse_program(compiled.as_text())
    cycles = estimate_cycles(program) if target.platform == "tpu" else None
    notes: tuple[str, ...] = ()
    if cycles is not None and cycles.unknown_loops:
        notes = (f"the trip counts of the loops {', '.join(cycles.unknown_loops)} are unknown; each body counts once.",)
    if cycles is not None and cycles.unknown_operations:
        shown = ", ".join(cycles.unknown_operations[:3])
        notes += (f"the compiler has no estimate for {len(cycles.unknown_operations)} operations, such as {shown}.",)
        cycles = None
    return Measurement(
        target=target.name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        host_temp_bytes=memory.host_temp_size_in_bytes,
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        estimated_cycles=None if cycles is None else cycles.total,
        compile_s=compile_s,
        live=read_live_buffers(program),
        notes=notes,
    )


def _read_costs(compiled: Any) -> dict[str, float]:
    costs = compiled.cost_analysis()
    return dict(costs[0] if isinstance(costs, list) else costs or {})
