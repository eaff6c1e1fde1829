"""The tools that run trainers: the probe reports what really happened, the overlay changes only what is declared."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e import runs, venvs
from tests.e2e.overlay import differing, overlaid

STEPS = """
import torch

model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
model[0].requires_grad_(False)
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
for _ in range(3):
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_the_probe_says_what_was_trained(tmp_path: Path, own_python: Path) -> None:
    (tmp_path / "train.py").write_text(STEPS)
    (facts,) = runs.train(tmp_path, "python train.py", python=own_python)
    runs.assert_trained(facts, trainable=5 * 2 + 2, steps=3)
    assert facts.parameters == 3 * 5 + 5 + 12
    assert facts.optimizer == "SGD"
    assert facts.optimizer_state_bytes == 4 * 12  # momentum in fp32
    assert facts.optimized == 12
    assert facts.classes == {"Parameter": 4}
    assert facts.trainable_dtypes == {"float32": 2}
    assert (facts.world, facts.backend, facts.checkpointing) == (1, None, False)


def test_a_run_that_fails_shows_its_end(tmp_path: Path, own_python: Path) -> None:
    with pytest.raises(AssertionError, match="exit 3\nlast words"):
        runs.train(tmp_path, "python -c 'print(\"last words\"); raise SystemExit(3)'", python=own_python)
    with pytest.raises(AssertionError, match="0 of 1 ranks"):
        runs.train(tmp_path, "python -c pass", python=own_python)


def test_a_run_may_change_only_what_is_declared() -> None:
    written = {"model": "llama-7b", "bnb": {"type": "nf4"}, "steps": 100}
    proof = overlaid(written, {"model": "tiny", "steps": None}, may={"model", "steps"})
    assert proof == {"model": "tiny", "bnb": {"type": "nf4"}}
    assert differing(written, proof) == {"model", "steps"}
    with pytest.raises(AssertionError):
        overlaid(written, {"bnb.type": "fp4"}, may={"model"})


def test_every_environment_has_pinned_requirements() -> None:
    for path in venvs.REQUIREMENTS.glob("*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
        assert lines, path
        assert all("==" in line for line in lines), path
