"""Files of plain data: both dialects of YAML, JSON, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan import datafile
from peftplan.errors import BadFile

DIALECTS = {
    "a: 1e-4": ({"a": 1e-4}, {"a": "1e-4"}),
    "a: no": ({"a": "no"}, {"a": False}),
    "a: 1:30": ({"a": "1:30"}, {"a": 90}),
    "a: [x, 2, null]": ({"a": ["x", 2, None]}, {"a": ["x", 2, None]}),
    '{"a": 1}': ({"a": 1}, {"a": 1}),
}


@pytest.mark.parametrize("text", DIALECTS)
def test_a_dialect_reads_what_its_readers_see(text: str) -> None:
    plain, pyyaml = DIALECTS[text]
    assert datafile.parse(text, "f") == plain
    assert datafile.parse(text, "f", dialect="pyyaml") == pyyaml


def test_the_last_of_two_equal_keys_counts_only_for_trainers() -> None:
    assert datafile.parse("a: 1\na: 2", "f", dialect="pyyaml") == {"a": 2}
    with pytest.raises(BadFile, match=r"f: line 2: 'a' twice"):
        datafile.parse("a: 1\na: 2", "f")


@pytest.mark.parametrize("dialect", ["plain", "pyyaml"])
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &x [1]\nb: *x", "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", "tags are not read"),
        ("a: [", "line"),
        ("[" * 5000, "nested too deeply|line"),
        ('{"a": NaN}', "NaN is not a number"),
    ],
)
def test_what_is_no_plain_data_is_refused(text: str, problem: str, dialect: datafile.Dialect) -> None:
    with pytest.raises(BadFile, match=problem):
        datafile.parse(text, "f", dialect=dialect)


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(BadFile, match="not a text file"):
        datafile.load(tmp_path / "f")
