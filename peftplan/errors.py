"""Everything peftplan raises on purpose.

PeftplanError            (exit_code)
 +- RequestError         2  the request is wrong: one line that names the offender and the fix
 |   +- UnknownName      2  a name that no catalog or plug-in folder holds, with the nearest matches
 |   +- BadFile          2  a file that cannot be read as what it should be
 |   +- Unsupported      2  well-formed, but not modelled (says what is)
 +- OutsideError         3  the outside failed: Hub unreachable, no GPU, a missing extra
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PeftplanError(Exception):
    exit_code = 2


class RequestError(PeftplanError):
    """The request is wrong."""


class UnknownName(RequestError):
    """`name` is not one of `known`; the message suggests the nearest."""

    def __init__(self, what: str, name: str, known: Iterable[str], hint: str = "") -> None:
        pool = {k.lower(): k for k in known}
        alike = difflib.get_close_matches(name.lower(), pool, n=4, cutoff=0.5)
        swapped_first = sorted(alike, key=lambda known: sorted(known) != sorted(name.lower()))
        near = [pool[k] for k in swapped_first]
        if near:
            fix = f"did you mean {', '.join(near)}?"
        elif len(pool) <= 12:
            fix = f"known: {', '.join(sorted(pool.values()))}"
        else:
            fix = ""
        super().__init__("; ".join(part for part in (f"unknown {what} {name!r}", fix, hint) if part))


class BadFile(RequestError):
    """A file that cannot be read as what it should be."""


class Unsupported(RequestError):
    """Well-formed, but outside what peftplan models; the message says what is inside."""


class OutsideError(PeftplanError):
    """Something outside the request failed."""

    exit_code = 3
