"""`peftplan plan` on one terminal screen: the configuration to run, what else there is and why it lost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.hardware.common import COMMON
from peftplan.planner import says
from peftplan.planner.result import Closest, Entry, Notch, Plan
from peftplan.report import words
from peftplan.report.screen import heading
from peftplan.units import format_bytes

MOST_ROWS = 5
"""Of the ranking and of the front; `--json` has them all."""
SHORT = {
    "flash_attention_2": "fa2", "flash_attention_3": "fa3", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32",
}  # fmt: skip


def render(plan: Plan) -> RenderableType:
    """The whole screen, about 40 lines at 100 columns."""
    middle = _recommended(plan) if plan.best is not None else _nothing(plan)
    sections: list[RenderableType] = [*middle, _counts(plan)]
    return Group(*(Group(Text(), section) for section in sections), Text())


# -- something fits ---------------------------------------------------------------------------------------------


def _recommended(plan: Plan) -> list[RenderableType]:
    best = plan.best
    assert best is not None
    return [
        _winner(plan, best),
        Group(_table("Ranking", "the best of each kind", plan.ranking), *_reasons(plan.ranking[:MOST_ROWS])),
        _table("Pareto front", "nothing beats these in cost, time, headroom and quality at once", plan.front),
        _notches("One notch more or less", plan.notches),
        _room(plan, best),
    ]


def _winner(plan: Plan, best: Entry) -> RenderableType:
    cards = f"{best.gpus} × " if best.gpus > 1 else ""
    line = Text.assemble((" RUN ", "bold white on #2e7d4f"), " on ", (cards + best.gpu, "bold"), f"   {_price(best)}")
    if best.headroom_bytes is not None:
        line.append(f" · {format_bytes(best.headroom_bytes)} to spare", style="#56b870")
    order = Text(f"decided by {', then '.join(plan.order)}", style="bright_black")
    return Group(line, Text(words.headline(best.job), style="bright_black"), *_total(best), *_change(plan, best), order)


def _change(plan: Plan, best: Entry) -> list[RenderableType]:
    """What to change, where that was the question."""
    if plan.goal.aim != "smallest_change":
        return []
    options = words.printable(says.changes(best.changes))
    return [Text.assemble(("change  ", "bold"), options if best.changes else "nothing: it fits as it is")]


def _price(entry: Entry) -> str:
    price = _usd(entry.usd_per_million_tokens)
    cost = f"{price} per million tokens" if price else "price unknown"
    return cost + (f" · {entry.tokens_per_second:,.0f} tokens/s" if entry.tokens_per_second else "")


def _total(entry: Entry) -> list[RenderableType]:
    if entry.hours is None:
        return []
    price = f" · {words.usd(entry.usd_total)}" if entry.usd_total is not None else ""
    return [Text(f"{entry.job.tokens:,} tokens in {entry.hours:,.1f} hours{price}", style="bright_black")]


def _usd(amount: float | None) -> str:
    """To the three digits that the ranking compares."""
    return "" if amount is None else f"${amount:.3g}"


def _room(plan: Plan, best: Entry) -> RenderableType:
    if plan.room is None:
        return Text()
    return Text.assemble(
        ("Still fits  ", "bold"),
        f"--micro-batch {plan.room.micro_batch} at this length, or --seq-len {plan.room.seq_len:,} "
        f"at micro-batch {best.job.micro_batch}",
    )


# -- nothing fits -----------------------------------------------------------------------------------------------


def _nothing(plan: Plan) -> list[RenderableType]:
    closest = plan.closest
    assert closest is not None
    line = Text.assemble((" NOTHING FITS ", "bold white on #b3364b"), " within what you asked; the closest:")
    why = [Text(f"{miss.what}: {miss.says}", style="bold #d4587b") for miss in closest.misses]
    head = Group(line, Text(words.headline(closest.entry.job)), Text(f"on {closest.entry.gpu}"), *why)
    return [head, *_helps(closest)]


def _helps(closest: Closest) -> list[RenderableType]:
    return [_notches("What would make it fit", closest.helps)] if closest.helps else []


# -- tables -----------------------------------------------------------------------------------------------------


def _table(title: str, note: str, entries: Sequence[Entry]) -> RenderableType:
    shown = entries[:MOST_ROWS]
    more = f"; {len(entries) - len(shown)} more with --json" if len(entries) > len(shown) else ""
    columns = [column for column in _COLUMNS if any(column[2](entry) for entry in shown)]
    rows = Table.grid(padding=(0, 2))
    for _, number, _cell in columns:
        rows.add_column(justify="right" if number else "left", no_wrap=number)
    rows.add_row(*(Text(name, style="bright_black") for name, _, _ in columns))
    for entry in shown:
        rows.add_row(*(Text(cell(entry)) for _, _, cell in columns))
    return Group(heading(title, note + more), rows)


def _method(entry: Entry) -> str:
    job = entry.job
    rank = f" r{job.rank}" if job.rank else ""
    return words.printable(f"{job.method}{rank}{_targets(job.target_modules)} {_short(job.format)}")


def _speed(entry: Entry) -> str:
    return f"{entry.tokens_per_second:,.0f}" if entry.tokens_per_second else ""


def _spare(entry: Entry) -> str:
    return format_bytes(entry.headroom_bytes) if entry.headroom_bytes is not None else ""


def _card(name: str) -> str:
    return COMMON.get(name, name)


def _short(name: str | None) -> str:
    return SHORT.get(name or "", name or "")


def _targets(names: object) -> str:
    return " all" if names == "all-linear" else ""


def _runs_with(entry: Entry) -> Iterable[str]:
    job = entry.job
    yield _short(job.attention)
    yield job.optimizer or ""
    if job.recompute not in (None, "none"):
        yield "recompute"
    yield from (str(choice) for choice in (job.kernels, job.offload, job.layout) if choice not in (None, "none", "hf"))


_COLUMNS: tuple[tuple[str, bool, Callable[[Entry], str]], ...] = (
    ("card", False, lambda entry: (f"{entry.gpus} × " if entry.gpus > 1 else "") + _card(entry.gpu)),
    ("method", False, _method),
    ("batch", False, lambda entry: f"{entry.job.micro_batch} × {entry.job.grad_accum}"),
    ("runs with", False, lambda entry: " ".join(_runs_with(entry))),
    ("$/M tokens", True, lambda entry: _usd(entry.usd_per_million_tokens)),
    ("tokens/s", True, _speed),
    ("spare", True, _spare),
    ("quality", True, lambda entry: f"{entry.quality:.3f}" if entry.quality is not None else ""),
)
"""Heading, whether it is a number, and the text of an entry's cell; a column without any text is left out."""


def _reasons(entries: Sequence[Entry]) -> list[RenderableType]:
    reasons = [(i, entry.lost) for i, entry in enumerate(entries, 1) if entry.lost is not None]
    return [Text(f"{i} lost: {words.printable(why)}", style="bright_black") for i, why in reasons]


def _notches(title: str, notches: Sequence[Notch]) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold")
    rows.add_column()
    for notch in notches:
        rows.add_row(words.printable(notch.change), words.printable(notch.says))
    return Group(heading(title), rows)


def _counts(plan: Plan) -> RenderableType:
    counts = plan.counts
    looked = f"{counts.candidates:,} configurations compared"
    parts = [
        looked,
        f"{counts.too_large:,} too large for their card" if counts.too_large else "",
        f"{counts.beyond_limits:,} beyond the limits" if counts.beyond_limits else "",
        f"{counts.refused:,} impossible or not modelled" if counts.refused else "",
        f"{plan.global_batch} sequences per step for all",
    ]
    notes = [a for a in plan.assumptions if a.what == "gpus"]
    lines = [" · ".join(part for part in parts if part), *(note.why for note in notes)]
    return Group(*(Text(words.printable(line), style="bright_black") for line in lines))
