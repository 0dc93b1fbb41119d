"""Measure the peak memory of this process above its use at the start of the measurement."""

from __future__ import annotations

from pathlib import Path


def read_status(field: str) -> float:
    """Read a field of /proc/self/status, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


class PeakMemory:
    """Resets the peak counter; `.mib` is the peak since then, less the use at that time."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self.before = read_status("VmRSS")

    @property
    def mib(self) -> float:
        """Peak memory since the start, in MiB above the memory at the start."""
        return read_status("VmHWM") - self.before
