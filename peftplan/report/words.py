"""How the reports say things: labels and colours of the kinds of memory, shares, prices, reasons."""

from __future__ import annotations

from collections.abc import Iterable

from peftplan.job import Assumption, Job
from peftplan.result import Estimate
from peftplan.units import format_bytes, format_count

_KINDS = {
    "weight": ("base weights", "#5b8def"),
    "weights": ("base weights", "#5b8def"),
    "adapter": ("adapter", "#2bb3a3"),
    "adapters": ("adapter", "#2bb3a3"),
    "buffer": ("buffers", "#7f8ea3"),
    "activation": ("activations", "#e9a23b"),
    "activations": ("activations", "#e9a23b"),
    "gradient": ("gradients", "#d4587b"),
    "gradients": ("gradients", "#d4587b"),
    "state": ("optimizer states", "#9a6dd7"),
    "optimizer": ("optimizer states", "#9a6dd7"),
    "average": ("average of weights", "#8fb339"),
    "temporary": ("temporaries", "#b08968"),
    "workspace": ("workspace", "#56b870"),
    "comm": ("communication", "#c77dbb"),
    "kv_cache": ("KV cache", "#e2c044"),
    "input": ("inputs", "#4aa3c7"),
    "loss": ("loss", "#e36b4f"),
}
_SPARE_COLOURS = ("#c77dbb", "#8fb339", "#4aa3c7", "#e36b4f")

CACHED_STYLE = "#5c6673"
CONTEXT_STYLE = "#8b95a1"

VERDICTS = {
    "fits": ("FITS", "bold white on #2e7d4f"),
    "tight": ("TIGHT", "bold black on #e9a23b"),
    "does_not_fit": ("DOES NOT FIT", "bold white on #b3364b"),
}


def label(kind: str) -> str:
    return _KINDS[kind][0] if kind in _KINDS else kind.replace("_", " ")


def colour(kind: str) -> str:
    if kind in _KINDS:
        return _KINDS[kind][1]
    return _SPARE_COLOURS[sum(kind.encode()) % len(_SPARE_COLOURS)]


def percent(part: float, whole: float) -> str:
    """A share for people: 42 %, 0.06 %, <0.01 %."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.01:
        return "<0.01 %"
    return f"{share:.0f} %" if share >= 10 else f"{share:.1f} %" if share >= 1 else f"{share:.2f} %"


def sizes(amounts: Iterable[int]) -> list[str]:
    """Bytes of one column in one unit, the largest amount's own, so that they compare at a glance."""
    column = list(amounts)
    largest = max(map(abs, column), default=0)
    unit, size = next((u for u in _UNITS if largest >= u[1]), ("B", 1))
    if size == 1:
        return [f"{amount} B" for amount in column]
    return [_in_unit(amount / size) + " " + unit for amount in column]


_UNITS = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def _in_unit(value: float) -> str:
    return "<0.01" if 0 < value < 0.005 else f"{value:.2f}"


def flop(count: int) -> str:
    text = format_count(count)
    return f"{text}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def usd(amount: float) -> str:
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.2f}" if amount >= 0.1 else f"${amount:.3g}"


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms" if value >= 0.01 else f"{value:.2g} s"


def assumed(assumption: Assumption) -> str:
    """`what = value`; bytes in a unit for people, of a long value its end."""
    value = assumption.value
    if assumption.what.endswith("_bytes") and isinstance(value, int):
        return f"{assumption.what} = {format_bytes(value)}"
    text = value_text(value)
    return f"{assumption.what} = {text if len(text) <= _LONG else '…' + text[-_LONG + 1 :]}"


_LONG = 32
"""Characters of a value beside which a sentence still fits on a narrow screen."""


def value_text(value: object) -> str:
    """A value as one would type it."""
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(value_text(v) for v in value)
    return f"{value:,}" if isinstance(value, int) else printable(str(value))


def printable(text: str) -> str:
    """`text` without control characters: names come from files that others wrote."""
    return "".join(c if c.isprintable() else "?" for c in text)


def moved(estimate: Estimate) -> tuple[Assumption, ...]:
    """The assumptions that moved the answer: all but the reasons of nulls."""
    return tuple(a for a in estimate.assumptions if a.value is not None)


def headline(job: Job) -> str:
    """The job in one line: model · method · weights · batch."""
    parts: Iterable[str | None] = (
        job.model,
        job.method + (f" r={job.rank}" if job.rank else ""),
        job.format or job.dtype,
        job.precision,
        job.optimizer,
        f"{job.micro_batch} × {job.seq_len} tokens" if job.seq_len else f"micro-batch {job.micro_batch}",
        f"× {job.grad_accum} steps" if job.grad_accum > 1 else None,
        f"recompute {job.recompute}" if job.recompute not in (None, "none") else None,
        f"{job.gpus * job.nodes} GPUs" if job.gpus * job.nodes > 1 else None,
    )
    return printable(" · ".join(part for part in parts if part))
