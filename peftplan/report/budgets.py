"""`peftplan check` for people: what is over its budget first, with the lines to change; as text or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from peftplan.budget import Check, Held, Judged, Lever
from peftplan.report import words
from peftplan.units import format_bytes

MOST_LEVERS = 3
_STYLES = {
    "within": ("within", "#56b870"),
    "over": ("OVER", "bold white on #b3364b"),
    "error": ("ERROR", "bold black on #e9a23b"),
}
_ORDER = ("error", "over", "within")


def render(check: Check) -> RenderableType:
    """One paragraph per configuration: what could not be judged, what is over, then the others."""
    widths = [max((len(cell(r)) for r in check.results), default=0) for cell in (_config, memory)]
    rows = [row for result in _sorted(check) for row in _paragraph(result, widths)]
    return Group(*rows, Text(), Text(summary(check), style="bold"))


def _paragraph(result: Judged, widths: list[int]) -> Iterator[Text]:
    title, style = _STYLES[result.status]
    name, size = _config(result).ljust(widths[0]), memory(result).rjust(widths[1])
    found = findings(result)
    apart = result.status != "within"
    inline = "" if apart else "  " + " · ".join(found)
    yield Text.assemble((title.ljust(6), style), f"  {name}  {size}", inline)
    if apart:
        yield from (Text(f"        {line}") for line in found)


def _config(result: Judged) -> str:
    return words.printable(result.config)


def markdown(check: Check) -> str:
    """The same as a Markdown table, for a pull request."""
    lines = ["| | configuration | memory | limits |", "|---|---|---:|---|"]
    for result in _sorted(check):
        said = "<br>".join(map(_escaped, findings(result)))
        title = _STYLES[result.status][0]
        lines.append(f"| {title} | `{_escaped(result.config)}` | {memory(result)} | {said} |")
    return "\n".join([f"**peftplan: {summary(check)}**", "", *lines])


def summary(check: Check) -> str:
    """How many of each, and what they were held against."""
    counts = {status: sum(r.status == status for r in check.results) for status in _ORDER}
    parts = [
        f"{counts['within']} within budget",
        f"{counts['over']} over" if counts["over"] else "",
        f"{counts['error']} could not be judged" if counts["error"] else "",
    ]
    return ", ".join(part for part in parts if part) + (f" (against {check.base})" if check.base else "")


def memory(result: Judged) -> str:
    """Of one device, with what it took at the base revision where that is another amount."""
    if result.device_bytes is None:
        return "" if result.status == "error" else "unknown"
    text = format_bytes(result.device_bytes)
    before = result.base_device_bytes
    if before is None or before == result.device_bytes:
        return text
    return f"{text} ({difference(result.device_bytes - before)})"


def difference(amount: int) -> str:
    """Bytes more or less."""
    return ("+" if amount >= 0 else "−") + format_bytes(abs(amount))


def findings(result: Judged) -> list[str]:
    """Each limit in words, broken ones first, and the lines that matter for the first broken one."""
    if result.error is not None and not result.limits:
        return [words.printable(result.error.removeprefix(f"{result.config}: "))]
    if result.status == "within":
        return [*(_brief(held, result) for held in result.limits), *_unpriced(result)]
    broken = [_sentence(held, result) for held in result.limits if held.status == "over"]
    kept = [_sentence(held, result) for held in result.limits if held.status != "over"]
    return [*broken, *_levers(result), *kept, *_unpriced(result)]


def _unpriced(result: Judged) -> list[str]:
    keys = ", ".join(remark.what for remark in result.unpriced)
    return [words.printable(f"not priced as written, could move memory: {keys}")] if keys else []


def _brief(held: Held, result: Judged) -> str:
    """A limit that is kept, without the memory that stands beside it."""
    if held.limit == "gpu":
        return f"✓ {result.verdict} on {held.stated}"
    told = held.limit == "max_memory" or held.found is None
    name = f"✓ {held.limit.replace('_', '-')} {held.stated}"
    return f"{name}: {held.why}" if held.why else name if told else f"{name}: {amount(held.found or 0, held)}"


def _sorted(check: Check) -> list[Judged]:
    return sorted(check.results, key=lambda result: _ORDER.index(result.status))


def _sentence(held: Held, result: Judged) -> str:
    mark = {"within": "✓", "over": "✗", "error": "?"}[held.status]
    name = held.limit.replace("_", "-")
    stated = f"{mark} {name} {held.stated}"
    if held.limit == "gpu":
        stated = f"{mark} {(result.verdict or 'unknown').replace('_', ' ')} on {held.stated}"
    if held.found is None or held.allowed is None:
        return f"{stated}: {held.why}"
    return f"{stated}: {amount(held.found, held)} of {amount(held.allowed, held)}"


def amount(value: float, held: Held) -> str:
    if held.unit == "usd":
        return words.usd(value)
    if held.unit == "bytes":
        return difference(int(value)) if held.limit == "max_growth" else format_bytes(int(value))
    return f"{value:,.1f} h"


def _levers(result: Judged) -> Iterator[str]:
    for lever in result.levers[:MOST_LEVERS]:
        yield words.printable(f"{lever.file}:{lever.line} {lever.text}  {_instead(lever)}")
    more = len(result.levers) - MOST_LEVERS
    if more > 0:
        yield f"and {more} more changed lines"


def _instead(lever: Lever) -> str:
    """What was there before, or was tried, and what it saves."""
    if lever.instead is None and lever.change == "drives":
        return "(no value of it can be lowered)"
    if lever.change == "drives":
        tried = "leaving it out" if lever.instead == "left out" else lever.instead
        return f"({tried} takes {_saving(lever)} less)"
    was = {"changed": f"was {lever.instead}", "added": "added; without it", "removed": "removed; with it"}[lever.change]
    return f"({was}, {_saving(lever)} less)" if lever.saves is not None else f"({was})"


def _saving(lever: Lever) -> str:
    saves = lever.saves or 0
    if lever.unit == "bytes":
        return f"{format_bytes(int(saves))} of the peak"
    return words.usd(saves) if lever.unit == "usd" else f"{saves * 1e6:,.3g} s per million tokens"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
