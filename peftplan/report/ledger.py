"""`peftplan explain`: every term of the peak with its formula and source, and the sums they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftplan.report import screen, words
from peftplan.result import Estimate, Term
from peftplan.units import format_bytes

if TYPE_CHECKING:
    from peftplan.breakdown import Saving


def document(estimate: Estimate, terms: Sequence[Term], savings: Sequence[Saving]) -> dict[str, Any]:
    """The same as one JSON object (schema `peftplan.explain/1`)."""
    answer = estimate.model_dump(mode="json", by_alias=True)
    return {
        "schema": "peftplan.explain/1",
        **{key: answer[key] for key in ("version", "job", "memory", "flops", "assumptions")},
        "terms": [term.model_dump(mode="json") for term in terms],
        "savings": [_saving(saving) for saving in savings],
    }


def _saving(saving: Saving) -> dict[str, Any]:
    return {
        "change": saving.change,
        "saved_bytes": saving.saved_bytes,
        "peak_bytes": saving.peak_bytes,
        "job": saving.job.model_dump(mode="json", by_alias=True),
    }


def render(estimate: Estimate, terms: Sequence[Term], savings: Sequence[Saving]) -> RenderableType:
    """Terms grouped by kind, largest first, with numbered sources; then FLOPs, assumptions and changes."""
    sources = list(dict.fromkeys(term.source for term in terms))
    title = Text.assemble(("Where the bytes come from", "bold"), (f"  {words.headline(estimate.job)}", "bright_black"))
    sections = [
        Group(title, _terms(terms, sources), _sums(estimate, terms)),
        _flops(estimate),
        _assumptions(estimate),
        screen.changes(savings),
        _sources(sources),
    ]
    return Group(*(Group(Text(), section) for section in sections), Text())


def _terms(terms: Sequence[Term], sources: list[str]) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(overflow="fold")
    rows.add_column(justify="right", no_wrap=True)
    rows.add_column(overflow="fold")
    rows.add_column(justify="right", no_wrap=True, style="bright_black")
    for kind, group in _by_kind(terms):
        total = sum(term.bytes for term in group)
        rows.add_row()
        rows.add_row(
            Text.assemble(("■ ", words.colour(kind)), (words.label(kind), "bold")),
            Text(format_bytes(total), style="bold"),
            Text(f"{total:,} bytes", style="bright_black"),
        )
        for term in sorted(group, key=lambda t: -t.bytes):
            number = f"[{sources.index(term.source) + 1}]"
            rows.add_row(Text("  " + term.name), format_bytes(term.bytes), Text(term.formula), Text(number))
    return rows


def _by_kind(terms: Sequence[Term]) -> list[tuple[str, list[Term]]]:
    groups: dict[str, list[Term]] = {}
    for term in terms:
        groups.setdefault(term.kind, []).append(term)
    return sorted(groups.items(), key=lambda item: -sum(term.bytes for term in item[1]))


def _sums(estimate: Estimate, terms: Sequence[Term]) -> RenderableType:
    total, peak = sum(term.bytes for term in terms), estimate.memory.peak_bytes
    line = Text(f"\nsum {total:,} bytes", style="bold")
    if total == peak:
        return line.append(f" = the peak, in {estimate.memory.at_peak_phase}")
    return line.append(f" · the peak is {peak:,} bytes, in {estimate.memory.at_peak_phase}")


def _flops(estimate: Estimate) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    rows.add_column()
    rows.add_column(justify="right")
    rows.add_column(justify="right", style="bright_black")
    flops = estimate.flops
    for name in ("forward", "backward", "recompute", "optimizer", "total"):
        amount = getattr(flops, name)
        rows.add_row(name, words.flop(amount), f"{amount:,}")
    return Group(screen.heading("Where the FLOPs come from", "per micro-batch of one replica, 1 MAC = 2"), rows)


def _assumptions(estimate: Estimate) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(overflow="fold")
    rows.add_column(style="bright_black")
    for assumption in estimate.assumptions:
        rows.add_row(words.assumed(assumption), assumption.why)
    return Group(screen.heading("What the answer assumes"), rows)


def _sources(sources: list[str]) -> RenderableType:
    rows = Table.grid(padding=(0, 1))
    for number, source in enumerate(sources, 1):
        rows.add_row(Text(f"[{number}]", style="bright_black"), Text(source))
    return Group(screen.heading("Sources"), rows)
