"""Which lines of a configuration put it over its budget.

Against a base revision: the lines that changed, each undone by itself to see what that saves. Without one, or where
no change is to blame: each number halved, each switch turned and each word left out, one at a time, to find the line
that the broken limit hangs on most.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from peftplan.budget.outcome import Lever, Unit
from peftplan.errors import PeftplanError

Measure = Callable[[str], float | int | None]
"""What the broken limit counts, for a text of the file; None where that text states no job. Lower is better."""

MOST_EDITS = 300
_PAIR = re.compile(
    r"""(?P<key>[A-Za-z_][\w.\-]*)["']?\s*[:=]\s*(?P<value>\d+|[Tt]rue|[Ff]alse)(?=\s*(?:[,}\]#]|$))""", re.M
)
_WORDED = re.compile(
    r"""^(?P<text>\s*["']?(?P<key>[A-Za-z_][\w.\-]*)["']?\s*[:=]\s*["']?(?!(?i:true|false|null)\b)[A-Za-z].*)$""", re.M
)
_TURNED = {"true": "false", "false": "true", "True": "False", "False": "True"}
Change = Literal["changed", "added", "removed", "drives"]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One line of the file, and the file's text with something else in its place."""

    line: int
    said: str
    instead: str | None
    text: str
    change: Change


@dataclass(frozen=True, kw_only=True)
class Place:
    """A file over its budget, and how a text of it is weighed."""

    file: str
    measure: Measure
    unit: Unit


def blame(text: str, before: str | None, *, model: str, place: Place) -> list[Lever]:
    """What changed since `before`, or else what drives, or else where the model is named."""
    found = changed(text, before, place) if before is not None and before != text else []
    return found or driving(text, place) or naming(text, model, place)


def changed(text: str, base: str, place: Place) -> list[Lever]:
    """The changed lines, best to undo first; all of them where only together they cost something, none where the base
    took as much."""
    edits, now = list(_undone(text, base))[:MOST_EDITS], place.measure(text)
    levers = _weighed(edits, now, place)
    together = levers if _saved(now, base, place.measure) is not None else []
    return [lever for lever in levers if lever.saves is not None] or together


def driving(text: str, place: Place) -> list[Lever]:
    """The line that the limit hangs on most, and those that weigh at least half as much."""
    edits = [*_varied(text), *_left_out(text)][:MOST_EDITS]
    levers = _weighed(edits, place.measure(text), place)
    most = levers[0].saves if levers else None
    return [lever for lever in levers if lever.saves is not None and lever.saves >= (most or 0) / 2]


def naming(text: str, model: str, place: Place) -> list[Lever]:
    """The line that names the model: all that is left where no value in the file can be lowered."""
    for number, line in enumerate(_lines(text), start=1):
        if model in line:
            said = line.strip()
            return [
                Lever(
                    file=place.file, line=number, text=said, change="drives", instead=None, saves=None, unit=place.unit
                )
            ]
    return []


def _weighed(edits: Iterable[Edit], now: float | int | None, place: Place) -> list[Lever]:
    """The edits with what each saves, most first, then by line."""
    levers = [
        Lever(
            file=place.file,
            line=edit.line,
            text=edit.said,
            change=edit.change,
            instead=edit.instead,
            saves=_saved(now, edit.text, place.measure),
            unit=place.unit,
        )
        for edit in edits
    ]
    return sorted(levers, key=lambda lever: (-(lever.saves or 0), lever.line))


def _saved(now: float | int | None, text: str, measure: Measure) -> float | int | None:
    try:
        then = measure(text)
    except PeftplanError:
        return None
    return now - then if now is not None and then is not None and then < now else None


# -- what changed -----------------------------------------------------------------------------------------------


def _undone(text: str, base: str) -> Iterator[Edit]:
    """Each change since `base`, undone: line by line where lines were replaced one for one."""
    new, old = _lines(text), _lines(base)
    for tag, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        pairs = zip(range(i, j), range(k, m), strict=True) if j - i == m - k else None
        hunks = [(a, a + 1, b, b + 1) for a, b in pairs] if pairs is not None else [(i, j, k, m)]
        for hunk in hunks:
            yield from _without(new, old, hunk)


def _without(new: list[str], old: list[str], hunk: tuple[int, int, int, int]) -> Iterator[Edit]:
    i, j, k, m = hunk
    text = "\n".join([*new[:k], *old[i:j], *new[m:]])
    before = "; ".join(line.strip() for line in old[i:j] if _says(line)) or None
    stated = [(number, line.strip()) for number, line in enumerate(new[k:m], start=k + 1) if _says(line)]
    if stated:
        for number, said in stated:
            change: Change = "changed" if before else "added"
            yield Edit(line=number, said=said, instead=before, text=text, change=change)
    elif before:
        yield Edit(line=max(1, min(k + 1, len(new))), said=before, instead=before, text=text, change="removed")


def _lines(text: str) -> list[str]:
    """Counted as editors do: git may hand out other line ends than the file has."""
    return text.replace("\r\n", "\n").split("\n")


def _says(line: str) -> bool:
    return bool(line.strip(" \t{}[],")) and not line.lstrip().startswith("#")


# -- what drives ------------------------------------------------------------------------------------------------


def _varied(text: str) -> Iterator[Edit]:
    """Each whole number from 2 on halved, each true or false turned."""
    for found in _PAIR.finditer(text):
        value = found["value"]
        other = _TURNED.get(value) or (str(int(value) // 2) if int(value) > 1 else None)
        if other is not None:
            start, end = found.span("value")
            yield _edit(text, found, f"{found['key']}: {value}", other, text[:start] + other + text[end:])


def _left_out(text: str) -> Iterator[Edit]:
    """Each line that gives a key a word, left out."""
    for found in _WORDED.finditer(text):
        start, end = found.span("text")
        yield _edit(text, found, found["text"].strip(), "left out", text[:start] + text[end:])


def _edit(text: str, found: re.Match[str], said: str, instead: str, changed_text: str) -> Edit:
    line = text.count("\n", 0, found.start("key")) + 1
    return Edit(line=line, said=said, instead=instead, text=changed_text, change="drives")
