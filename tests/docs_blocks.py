"""Code blocks of README.md and docs/: found, run, and their shown output kept current.

```console   lines that start with `$ ` are run in the page's own folder (`peftplan ...` only); the lines
             below one, where there are any, are what it must print; `...` stands for any lines
```python    run in one namespace for the page
```yaml X    (or json X) written to the file X of the page's folder

`python -m tests.docs_blocks` rewrites the shown output in every page; a line `(output)` asks for it. Generated pages
are written by `python -m tests.docs_pages`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
WIDTH = 100
_BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block: its language, the word after it, its text and where the text starts in the page."""

    language: str
    name: str | None
    text: str
    start: int


@dataclass(frozen=True, kw_only=True)
class Command:
    """One `$ ` line and the output shown below it (empty where none is shown)."""

    line: str
    shown: str


def blocks(page: str) -> list[Block]:
    return [Block(language=m[1], name=m[2], text=m[3], start=m.start(3)) for m in _BLOCK.finditer(page)]


def commands(text: str) -> list[Command]:
    parts = re.split(r"^\$ ", text, flags=re.M)[1:]
    split = (part.partition("\n") for part in parts)
    return [Command(line=line, shown=shown.rstrip("\n")) for line, _, shown in split]


def run(line: str) -> tuple[int, str]:
    """The exit code of `line` and what it prints to stdout and stderr together."""
    from peftplan.cli import main

    program, *arguments = shlex.split(line, comments=True)
    if program != "peftplan":
        raise AssertionError(f"a console block may only run peftplan, not {program}")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = main(arguments)
    return code, "\n".join(row.rstrip() for row in printed.getvalue().splitlines()).rstrip("\n")


def agrees(shown: str, printed: str) -> bool:
    """`shown` is what was `printed`, with `...` for any lines; showing nothing agrees with everything."""
    if not shown:
        return True
    parts = re.split(r"^\.\.\.$", shown, flags=re.M)
    return re.fullmatch(".*".join(map(re.escape, parts)), printed.strip("\n"), flags=re.S) is not None


@contextlib.contextmanager
def page_folder(page: str) -> Iterator[None]:
    """A scratch folder with the page's named files, as the working directory of a 100-column pipe."""
    before, columns = os.getcwd(), os.environ.get("COLUMNS")
    with tempfile.TemporaryDirectory() as folder:
        for block in blocks(page):
            if block.name is not None:
                (Path(folder) / block.name).write_text(block.text, encoding="utf-8")
        os.chdir(folder)
        os.environ["COLUMNS"] = str(WIDTH)
        try:
            yield
        finally:
            os.chdir(before)
            os.environ.pop("COLUMNS")
            if columns is not None:
                os.environ["COLUMNS"] = columns


def refreshed(page: str) -> str:
    """`page` with what each command prints today below it, where output is shown; `...` keeps its place."""
    with page_folder(page):
        found = [b for b in blocks(page) if b.language == "console"]
        texts = ["".join(_again(command) for command in commands(block.text)) for block in found]
    for block, text in reversed(list(zip(found, texts, strict=True))):
        page = page[: block.start] + text + page[block.start + len(block.text) :]
    return page


def _again(command: Command) -> str:
    if not command.shown:
        return f"$ {command.line}\n"
    printed = run(command.line)[1].strip("\n")
    shown = command.shown if agrees(command.shown, printed) else printed
    return f"$ {command.line}\n{shown}\n"


def refresh() -> None:
    """Rewrite the shown output in every page."""
    for path in PAGES:
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    refresh()
