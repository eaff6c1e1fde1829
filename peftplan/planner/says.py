"""Differences between two configurations, in words."""

from __future__ import annotations

from typing import Any

from peftplan.planner.goal import Objective
from peftplan.planner.result import Change, Entry
from peftplan.units import format_bytes


def lost(entry: Entry, winner: Entry, objective: Objective | None) -> str:
    """Why `winner` is before `entry`: the first objective in which they differ."""
    if objective is None:
        return "equal in every objective; the winner comes first in the space"
    return _REASONS[objective](entry, winner)


def _cost(entry: Entry, winner: Entry) -> str:
    mine, theirs = entry.usd_per_million_tokens, winner.usd_per_million_tokens
    if mine is None or theirs is None:
        return "its price or speed is unknown"
    return f"costs {usd(mine)} per million tokens, not {usd(theirs)} ({_more(mine, theirs)})"


def _time(entry: Entry, winner: Entry) -> str:
    mine, theirs = entry.tokens_per_second, winner.tokens_per_second
    if mine is None or theirs is None:
        return "its speed is unknown"
    return f"{mine:,.0f} tokens/s, not {theirs:,.0f} ({_more(mine, theirs)})"


def _quality(entry: Entry, winner: Entry) -> str:
    if entry.quality is None:
        return f"no measured quality: {entry.quality_why}"
    return f"measured accuracy {entry.quality:.3f}, not {winner.quality or 0:.3f}"


def _headroom(entry: Entry, winner: Entry) -> str:
    return f"allocates {format_bytes(entry.peak_bytes)} at its peak, the winner {format_bytes(winner.peak_bytes)}"


def _simplicity(entry: Entry, winner: Entry) -> str:
    return f"changes more: effort {entry.effort}, not {winner.effort}"


_REASONS = {
    "cost": _cost,
    "time": _time,
    "quality": _quality,
    "headroom": _headroom,
    "simplicity": _simplicity,
}


def buys(entry: Entry, winner: Entry) -> str:
    """What `entry` has over `winner`, or costs beside it."""
    parts = []
    if entry.usd_per_million_tokens is not None and winner.usd_per_million_tokens is not None:
        change = _more(entry.usd_per_million_tokens, winner.usd_per_million_tokens)
        parts.append(f"{usd(entry.usd_per_million_tokens)} per million tokens ({change})")
    if entry.tokens_per_second is not None and winner.tokens_per_second is not None:
        change = _more(entry.tokens_per_second, winner.tokens_per_second)
        parts.append(f"{entry.tokens_per_second:,.0f} tokens/s ({change})")
    if entry.headroom_bytes is not None:
        parts.append(f"{format_bytes(entry.headroom_bytes)} to spare")
    return ", ".join(parts)


def _more(value: float, than: float) -> str:
    share = 100 * (value / than - 1) if than else 0.0
    if abs(share) < 0.05:
        return "the same"
    return f"{share:+.1f} %" if abs(share) < 9.95 else f"{share:+.0f} %"


def usd(amount: float) -> str:
    """Dollars to three significant digits."""
    return f"${amount:,.0f}" if amount >= 100 else f"${amount:.3g}"


def changes(found: tuple[Change, ...]) -> str:
    """Changed fields as options."""
    return " ".join(_option(change) for change in found) or "nothing"


def _option(change: Change) -> str:
    if "." in change.field:
        return f"--set {change.field}={_text(change.after)}"
    return f"--{change.field.replace('_', '-')} {_text(change.after)}"


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
