"""What nvidia-smi says of the card: its name before torch makes a context on it, its clocks while it works."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

from peftplan.units import MIB

TIMEOUT_SECONDS = 20
_FIELDS = (
    "name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One reading. None where the driver does not say."""

    name: str
    driver: str
    total_bytes: int | None
    used_bytes: int | None
    """By all processes, to a MiB."""
    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    power_watts: float | None
    temperature_celsius: int | None


def read(meanwhile: Callable[[], None] | None = None) -> Card | None:
    """The first card that CUDA may use; None where nvidia-smi is missing or fails. `meanwhile` is called again and
    again until nvidia-smi has answered, so that it sees a card at work."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits", "-i", first]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
            while meanwhile is not None and asked.poll() is None:
                meanwhile()
            printed, _ = asked.communicate(timeout=TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = printed.strip().splitlines()
    return parse(lines[0]) if asked.returncode == 0 and lines else None


def parse(line: str) -> Card | None:
    """The card of one line of nvidia-smi's CSV; None where it is another kind of line."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(_FIELDS):
        return None
    name, driver, total, used, sm_clock, memory_clock, power, temperature = cells
    return Card(
        name=name,
        driver=driver,
        total_bytes=_bytes(total),
        used_bytes=_bytes(used),
        sm_clock_mhz=_whole(sm_clock),
        memory_clock_mhz=_whole(memory_clock),
        power_watts=_number(power),
        temperature_celsius=_whole(temperature),
    )


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:  # [N/A], [Not Supported]
        return None


def _whole(cell: str) -> int | None:
    found = _number(cell)
    return None if found is None else round(found)


def _bytes(cell: str) -> int | None:
    found = _whole(cell)
    return None if found is None else found * MIB
