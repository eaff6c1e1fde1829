"""Predicted against measured as a picture; needs matplotlib (`pip install peftplan[plot]`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftplan.accuracy import Row, grouped
from peftplan.errors import OutsideError, RequestError
from peftplan.units import GIB

SUFFIXES = (".svg", ".png", ".pdf")
_COLOURS = ("#3b5b92", "#d4587b", "#56b870", "#c98a2b", "#7a5195", "#2f8f9d", "#8c8c8c", "#4f4f4f")


def draw(rows: Sequence[Row], target: Path) -> None:
    """Write the picture of every judged row: what was measured, and by how much the prediction is off.

    Raises RequestError for a name of another kind of file, OutsideError without matplotlib.
    """
    if target.suffix not in SUFFIXES:
        raise RequestError(f"--plot {target}: give a name ending in {', '.join(SUFFIXES)}")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise OutsideError('a plot needs matplotlib; pip install "peftplan[plot]"') from None
    mpl.rcParams["svg.hashsalt"] = "peftplan"
    figure = Figure(figsize=(9, 7.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    judged = [row for row in rows if row.predicted_bytes is not None]
    for (kind, group), colour in zip(grouped(judged, "kind").items(), _COLOURS, strict=False):
        measured = [row.measured_bytes / GIB for row in group]
        dots: dict[str, Any] = {"marker": "o", "ms": 4, "ls": "", "alpha": 0.6, "color": colour}
        above.plot(measured, [(row.predicted_bytes or 0) / GIB for row in group], label=kind, **dots)
        below.plot(measured, [100 * (row.error or 0) for row in group], **dots)
    ends = [min(row.measured_bytes for row in judged) / GIB, max(row.measured_bytes for row in judged) / GIB]
    above.plot(ends, ends, color="#999999", lw=0.8, zorder=0)
    above.set(xscale="log", yscale="log", ylabel="predicted GiB", title=f"{len(judged)} values measured on GPUs")
    above.legend(frameon=False, fontsize=8)
    below.axhspan(-5, 5, color="#999999", alpha=0.15, lw=0)
    below.axhline(0, color="#999999", lw=0.8)
    below.set(xlabel="measured GiB", ylabel="error, %")
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
