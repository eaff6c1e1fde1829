"""Every plug-in file keeps every promise, the published card says so, and a new file is found by being there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from peftplan import methods, plugins
from peftplan.graph.blocks.decoder import decoder
from peftplan.graph.core import verify
from peftplan.pipeline import estimate
from peftplan.report import lists
from peftplan.resolve import resolve
from tests.conformance import zoo
from tests.conformance.card import grades, members, page
from tests.conformance.checks import FAIL, MISSING, NA, PASS, Member
from tests.docs_pages import methods_page

ROOT = Path(__file__).parent.parent.parent
TOY = '''"""A toy that trains the norms and nothing else, to be found by being here.

Trains: the weights of the norms.
Keeps for backward: as full fine-tuning, less the inputs of frozen linear layers.
Not modelled: nothing known.
"""

from dataclasses import dataclass
from typing import ClassVar

from peftplan.graph.edit import train
from peftplan.methods.base import Family, Method


@dataclass(frozen=True)
class Toy(Method):
    final: bool = True
    family: ClassVar[Family] = "selective"
    libraries: ClassVar[tuple[str, ...]] = ()

    def apply(self, graph, host):
        return train(graph, lambda region, weight: "norm" in weight.name and (self.final or region.name == "layers"))


METHOD = Toy
EXAMPLES = (Toy(), Toy(final=False))
UNVERIFIED = {"costs": "a toy is compared with nothing"}
'''


def _name(member: Member) -> str:
    return f"{member.kind} {member.name}"


@pytest.mark.parametrize("member", list(members()), ids=_name)
def test_a_plug_in_keeps_its_promises(member: Member) -> None:
    assert {name: grade for name, grade in grades(member).items() if grade.grade in (FAIL, MISSING)} == {}


def test_the_card_is_current() -> None:
    assert (ROOT / "docs" / "report-card.md").read_text(encoding="utf-8") == page()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A method's file in a folder that the methods' package is told to look into too."""
    path = tmp_path / "toy.py"
    path.write_text(TOY)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    _forget()
    yield path
    monkeypatch.undo()
    sys.modules.pop("peftplan.methods.toy", None)
    vars(methods).pop("toy", None)
    _forget()


def _forget() -> None:
    plugins.names.cache_clear()
    plugins.aliases.cache_clear()


def test_a_new_file_is_a_new_method(toy: Path) -> None:
    assert "toy" in methods.names()
    (row,) = lists.rows("methods", "toy")
    assert row["name"] == "toy"
    assert row["trains"] == "the weights of the norms"
    assert "](#toy) | selective | A toy that trains" in methods_page()
    found = estimate(zoo.job("grouped", {"method": "toy"})).parameters
    assert found.trainable == 7 * 48
    assert f"| {toy.stem} |" in page()


@pytest.mark.usefixtures("toy")
def test_a_new_file_is_graded_by_what_it_says_of_itself() -> None:
    (member,) = (m for m in members() if m.name == "toy")
    found = {name: grade.grade for name, grade in grades(member).items()}
    assert found.pop("costs") == "UNVERIFIED"
    assert set(found.values()) == {PASS}


def test_a_file_that_lacks_its_parts_is_told_which(toy: Path) -> None:
    toy.write_text('"""Short."""\n')
    (member,) = (m for m in members() if m.name == "toy")
    found = grades(member)
    assert {grade.grade for grade in found.values()} == {MISSING}
    assert found["declares"].note == "METHOD, EXAMPLES, UNVERIFIED"
    assert NA not in {grade.grade for grade in found.values()}


@pytest.mark.parametrize("model", zoo.MODELS)
def test_malformed_graphs_are_told_apart(model: str) -> None:
    case = resolve(zoo.job(model, {}))
    graph = decoder(case.arch, case.setup)
    assert list(verify(graph)) == []
    first, layers, *rest = graph.regions
    for broken in (
        (first, replace(layers, ops=layers.ops[1:]), *rest),
        (first, replace(layers, ops=(*layers.ops, layers.ops[0])), *rest),
        (layers, first, *rest),
    ):
        assert list(verify(replace(graph, regions=broken)))
