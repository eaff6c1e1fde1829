"""`peftplan estimate` on one terminal screen: the verdict first, then why, then what would change it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.report import words
from peftplan.report.bars import Bar, Beside, Gauge
from peftplan.report.cards import Card
from peftplan.result import Estimate, Fit, Memory
from peftplan.units import format_bytes, format_count

if TYPE_CHECKING:
    from peftplan.breakdown import Saving

MAX_ASSUMPTIONS = 6


def render(estimate: Estimate, savings: Sequence[Saving], cards: Sequence[Card]) -> RenderableType:
    """The whole screen, about 40 lines at 100 columns. `cards` are the GPUs to try it on, smallest first."""
    sections: list[RenderableType] = [
        _verdict(estimate, cards),
        _gauge(estimate),
        _memory(estimate),
        _facts(estimate),
        _assumptions(estimate),
        changes(savings),
        _fits_on(estimate, cards),
    ]
    return Group(*(Group(Text(), section) for section in sections), Text())


def heading(text: str, note: str = "") -> Text:
    return Text.assemble((text, "bold"), (f"  {note}" if note else "", "bright_black"))


def needed_bytes(memory: Memory) -> int:
    """What a card must hold, as far as it is known: with the context, else as reserved, else as allocated."""
    return _needed(memory)[1]


def _needed(memory: Memory) -> tuple[str, int]:
    """The fullest reading of memory there is, and what to call it."""
    if memory.device_bytes is not None:
        return "on the card", memory.device_bytes
    if memory.reserved_bytes is not None:
        return "reserved", memory.reserved_bytes
    return "allocated", memory.peak_bytes


# -- the verdict ------------------------------------------------------------------------------------


def _verdict(estimate: Estimate, cards: Sequence[Card]) -> RenderableType:
    line = _judged(estimate) if estimate.fit.verdict else _unjudged(estimate, cards)
    return Group(line, Text(words.headline(estimate.job), style="bright_black"), *_calibrated(estimate.fit))


def _calibrated(fit: Fit) -> Iterator[RenderableType]:
    """What measured runs say of the verdict."""
    if fit.probability is not None and fit.low_bytes is not None and fit.high_bytes is not None:
        between = f"{format_bytes(fit.low_bytes)} to {format_bytes(fit.high_bytes)}"
        says = f"measured runs like it: nine in ten would hold {between}; chance that it runs {fit.probability:.0%}"
        yield Text(says, style="bright_black")


def _judged(estimate: Estimate) -> Text:
    fit, needed = estimate.fit, needed_bytes(estimate.memory)
    name, style = words.VERDICTS[fit.verdict or "fits"]
    line = Text.assemble((f" {name} ", style), " on ", (fit.gpu or "this GPU", "bold"))
    line.append(f"   needs {format_bytes(needed)} of {format_bytes(fit.usable_bytes or 0)} usable")
    return line.append_text(_headroom(fit.headroom_bytes or 0))


def _headroom(spare_bytes: int) -> Text:
    if spare_bytes < 0:
        return Text.assemble(" · ", (f"{format_bytes(-spare_bytes)} too much", "bold #d4587b"))
    return Text.assemble(" · ", (f"{format_bytes(spare_bytes)} to spare", "#56b870"))


def _unjudged(estimate: Estimate, cards: Sequence[Card]) -> Text:
    what, needed = _needed(estimate.memory)
    line = Text.assemble((f" NEEDS {format_bytes(needed)} ", "bold white on #3b5b92"), f" {what} · ")
    smallest = [card for card in cards if card.holds(needed)][:2]
    if not smallest:
        return line.append("more than any common GPU holds")
    names = " or ".join(card.name for card in smallest)
    return line.append_text(Text.assemble("fits on ", (names, "bold"), " and larger"))


# -- memory -----------------------------------------------------------------------------------------


def _kinds(memory: Memory) -> list[tuple[str, int]]:
    return sorted(((k, b) for k, b in memory.at_peak.items() if b), key=lambda item: -item[1])


def _overheads(memory: Memory) -> list[tuple[str, int, str]]:
    """What the card holds beyond the tensors: label, bytes, colour."""
    if memory.reserved_bytes is None:
        return []
    cached = ("cached, fragments", memory.reserved_bytes - memory.peak_bytes, words.CACHED_STYLE)
    if memory.device_bytes is None:
        return [cached]
    outside = memory.device_bytes - memory.reserved_bytes
    return [cached, ("context, libraries", outside, words.CONTEXT_STYLE)]


def _gauge(estimate: Estimate) -> RenderableType:
    memory, needed = estimate.memory, needed_bytes(estimate.memory)
    parts = [(b, words.colour(kind)) for kind, b in _kinds(memory)]
    parts += [(b, style) for _, b, style in _overheads(memory)]
    usable = estimate.fit.usable_bytes
    if usable is None:
        return Gauge(parts=parts, limit=needed)
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_row(Gauge(parts=parts, limit=usable), Text(words.percent(needed, usable), style="bold"))
    return grid


def _memory(estimate: Estimate) -> RenderableType:
    return Beside(left=_by_kind(estimate.memory), right=_by_phase(estimate.memory))


def _by_kind(memory: Memory) -> RenderableType:
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(no_wrap=True, min_width=20)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(ratio=1)
    what, needed = _needed(memory)
    parts = [(words.label(kind), b, words.colour(kind)) for kind, b in _kinds(memory)] + _overheads(memory)
    *sizes, total = words.sizes([*(b for _, b, _ in parts), needed])
    largest = max((b for _, b, _ in parts), default=1)
    for (name, amount, style), size in zip(parts, sizes, strict=True):
        rows.add_row(Text.assemble(("■ ", style), name), size, _bar(amount, largest, style))
    rows.add_row(Text(f"  {what}", style="bold"), Text(total, style="bold"))
    return Group(heading("At the peak", f"in {memory.at_peak_phase}"), rows)


def _by_phase(memory: Memory) -> RenderableType:
    rows = Table.grid(padding=(0, 1), expand=True)
    rows.add_column(no_wrap=True)
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(ratio=1)
    highest = max(memory.phases.values(), default=1)
    sizes = words.sizes(memory.phases.values())
    for (phase, amount), size in zip(memory.phases.items(), sizes, strict=True):
        style = "#e9a23b" if phase == memory.at_peak_phase else "#7f8ea3"
        rows.add_row(phase, size, _bar(amount, highest, style))
    kept = Text(f"{format_bytes(memory.static_bytes)} stay between steps", style="bright_black")
    return Group(heading("Peak of each phase"), rows, kept)


def _bar(amount: int, largest: int, style: str) -> Bar:
    return Bar(share=amount / max(largest, 1), style=style, widest=26)


# -- time, cost, counts -----------------------------------------------------------------------------


def _facts(estimate: Estimate) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="bold", no_wrap=True)
    rows.add_column()
    rows.add_row("Trains", _parameters(estimate))
    rows.add_row("Computes", _flops(estimate))
    rows.add_row("Time", _time(estimate))
    rows.add_row("Cost", _cost(estimate))
    return rows


def _parameters(estimate: Estimate) -> Text:
    count = estimate.parameters
    share = words.percent(count.trainable, count.total)
    return Text(
        f"{format_count(count.trainable)} of {format_count(count.total)} parameters ({share})"
        f" · stored in {format_bytes(count.stored_bytes)}"
    )


def _flops(estimate: Estimate) -> Text:
    flops = estimate.flops
    again = f" · recompute {format_count(flops.recompute)}" if flops.recompute else ""
    return Text(
        f"{words.flop(flops.total)} per micro-batch"
        f" · forward {format_count(flops.forward)} · backward {format_count(flops.backward)}{again}"
    )


def _unknown(why: str) -> Text:
    return Text.assemble(("unknown", "italic"), (f" · {why}" if why else "", "bright_black"))


def _time(estimate: Estimate) -> Text:
    time = estimate.time
    if time.step_seconds is None:
        return _unknown(estimate.reason("time.step_seconds", "step_seconds", "time"))
    step = time.step_seconds
    parts = [
        f"{words.seconds(step.expected)} per step ({words.seconds(step.low)} to {words.seconds(step.high)})",
        f"{time.tokens_per_second:,.0f} tokens/s" if time.tokens_per_second is not None else "",
        f"{words.percent(time.mfu, 1)} of peak FLOP/s" if time.mfu is not None else "",
    ]
    return Text(" · ".join(part for part in parts if part))


def _cost(estimate: Estimate) -> Text:
    cost = estimate.cost
    parts = [
        f"{words.usd(cost.usd_total)} in total" if cost.usd_total is not None else "",
        f"{words.usd(cost.usd_per_million_tokens)} per million tokens"
        if cost.usd_per_million_tokens is not None
        else "",
        f"{words.usd(cost.usd_per_hour)} per hour" if cost.usd_per_hour is not None else "",
        f"{cost.energy_kwh:,.1f} kWh" if cost.energy_kwh is not None else "",
    ]
    known = " · ".join(part for part in parts if part)
    return Text(known) if known else _unknown(estimate.reason("cost.usd_per_hour", "usd_per_hour", "cost"))


# -- why, and what would change it ------------------------------------------------------------------


def _assumptions(estimate: Estimate) -> RenderableType:
    assumptions = words.moved(estimate)
    shown, hidden = assumptions[:MAX_ASSUMPTIONS], len(assumptions[MAX_ASSUMPTIONS:])
    note = f"{hidden} more in `peftplan explain`" if hidden else ""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(no_wrap=True)
    rows.add_column(style="bright_black")
    for assumption in shown:
        rows.add_row(words.assumed(assumption), assumption.why)
    return Group(heading("What moved the answer", note), rows)


def changes(savings: Sequence[Saving]) -> RenderableType:
    """The changes that lower the peak most, with what each saves and where it leads."""
    title = heading("What would lower the peak most")
    if not savings:
        return Group(title, Text("nothing that peftplan knows of", style="bright_black"))
    rows = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "left"):
        rows.add_column(justify=justify, no_wrap=True)
    sizes = words.sizes(saving.saved_bytes for saving in savings)
    for saving, size in zip(savings, sizes, strict=True):
        peak = f"→ peak {format_bytes(saving.peak_bytes)}"
        rows.add_row(Text(saving.change, style="bold"), Text(f"−{size}", style="#56b870"), peak)
    return Group(title, rows)


def _fits_on(estimate: Estimate, cards: Sequence[Card]) -> RenderableType:
    needed = needed_bytes(estimate.memory)
    marks = [("✓", "#56b870") if card.holds(needed) else ("✗", "bright_black") for card in cards]
    names = [Text(f"{mark} {card.name}", style=style) for card, (mark, style) in zip(cards, marks, strict=True)]
    return Group(heading("Fits on"), Columns(names, padding=(0, 3)))
