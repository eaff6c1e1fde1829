"""Example configs of the trainers' own repositories: read, priced or refused with a reason, written back."""

from __future__ import annotations

from pathlib import Path

import pytest

from peftplan import trainers
from peftplan.errors import Unsupported
from peftplan.pipeline import estimate
from peftplan.trainers import Run
from tests.trainers import trips

NAMES = ("axolotl", "litgpt", "llamafactory", "swift", "torchtune", "unsloth")
EXAMPLES = [(name, path) for name in NAMES for path in trips.examples(name)]
IDS = [f"{name}/{path.stem}" for name, path in EXAMPLES]
REFUSED = {"llama2-qlora-fsdp", "llama31-fft-liger-fsdp"}


@pytest.mark.parametrize(("name", "path"), EXAMPLES, ids=IDS)
def test_the_trainer_is_known_by_its_keys(name: str, path: Path) -> None:
    assert trainers.read_config(path).trainer == name
    assert path.read_text(encoding="utf-8").startswith("# source: ")


@pytest.mark.parametrize(("name", "path"), EXAMPLES, ids=IDS)
def test_it_is_priced(name: str, path: Path) -> None:
    del name
    job = trainers.read_config(path)
    if path.stem in REFUSED:
        with pytest.raises(Unsupported, match="not modelled yet"):
            estimate(job)
    else:
        answer = estimate(job)
        assert answer.memory.peak_bytes > answer.parameters.stored_bytes > 0


@pytest.mark.parametrize(("name", "path"), EXAMPLES, ids=IDS)
def test_it_is_written_back_as_it_was_priced(name: str, path: Path) -> None:
    """What is written is priced the same, says everything that was kept, and is written the same again."""
    trainer = trainers.get(name)
    job = trainers.read_config(path)
    written = trainer.config(job, Run())
    back = trainer.read(written, name="back")
    assert trainer.config(back, Run()) == written
    if path.stem not in REFUSED:
        assert estimate(back).memory == estimate(job).memory
    assert not trips.unknown_keys(name, written) - set(job.extras)


@pytest.mark.parametrize(("name", "path"), EXAMPLES, ids=IDS)
def test_every_remark_says_why(name: str, path: Path) -> None:
    del name
    for remark in trainers.read_config(path).remarks:
        assert remark.why
        assert "could move memory either way" not in remark.why, remark
        assert "not a key of" not in remark.why, remark
