"""README and docs: code blocks run, shown output and generated pages are current, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import docs_blocks, docs_pages
from tests.docs_blocks import PAGES, ROOT


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_code_blocks_run_and_show_what_they_print(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    with docs_blocks.page_folder(page):
        for block in docs_blocks.blocks(page):
            if block.language == "python":
                exec(compile(block.text, _name(path), "exec"), namespace)
            for command in docs_blocks.commands(block.text) if block.language == "console" else ():
                code, printed = docs_blocks.run(command.line)
                over_budget = code == 1 and command.line.startswith("peftplan check")
                assert code == 0 or over_budget or re.search(r"^error: ", command.shown, re.M), printed
                assert docs_blocks.agrees(command.shown, printed), (command.line, printed)


@pytest.mark.parametrize("name", docs_pages.QUICK)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == docs_pages.QUICK[name]()


def test_the_readmes_errors_are_those_of_the_accuracy_page() -> None:
    assert "| reserved_peak |" in docs_pages.readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == docs_pages.readme()


@pytest.mark.parametrize("path", PAGES, ids=_name)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_page_is_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        path = todo.pop()
        seen.add(path)
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            linked = (path.parent / target).resolve()
            pages = linked.rglob("*.md") if linked.is_dir() else [linked]
            todo += [page for page in pages if page.suffix == ".md" and page not in seen]
    assert set(PAGES) <= seen


def test_ci_runs_the_readmes_commands_and_nothing_else() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    marks = ("<!-- tests -->", "<!-- trainers -->")
    stated = "\n".join(docs_blocks.blocks(readme.partition(mark)[2])[0].text.strip() for mark in marks)
    script = ROOT / ".ci" / "run"
    shown = subprocess.run([script, "--show"], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == stated
    code = re.sub(r"^#.*$", "", script.read_text(encoding="utf-8"), flags=re.M)
    assert not re.search(r"\b(pip|pytest|ruff|mypy)\b", code)


def test_the_readmes_commands_name_what_the_project_needs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    core = docs_blocks.blocks(readme.partition("<!-- core -->")[2])[0].text
    assert core.strip() == "pip install . && peftplan estimate --model llama-7b --method qlora"


def test_shown_output_is_compared_line_by_line() -> None:
    (command,) = docs_blocks.commands("$ peftplan x\na\n...\nd\n")
    assert (command.line, command.shown) == ("peftplan x", "a\n...\nd")
    assert docs_blocks.agrees(command.shown, "a\nb\nc\nd")
    assert not docs_blocks.agrees(command.shown, "a\nb\nc")
    assert not docs_blocks.agrees("a", "b")
    assert docs_blocks.agrees("", "anything")
