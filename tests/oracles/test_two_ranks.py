"""Two real processes that share a model's matrices, over gloo on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftplan.job import make_job
from peftplan.pipeline import read

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_of_two_ranks_holds_what_is_said(tmp_path: Path, tied: bool) -> None:
    config = {**CONFIG, "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "tests.oracles.two_ranks"]
    where = [str(tmp_path / "store"), str(tmp_path / "config.json")]
    both = [subprocess.Popen([*command, str(rank), *where], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    first, second = (json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in both)
    plain: dict[str, Any] = {"precision": "bf16", "batching": "exact", "recompute": "none", "backend": "cpu"}
    found = read(
        make_job(model="llama", config=config, method="full", layout="tp=2", micro_batch=3, seq_len=17, **plain)
    )
    assert first["loss"] == second["loss"]
    assert first["weights"] == found.static["weight"] >= second["weights"]
    assert first["states"] == found.static["state"]
    assert first["gradients"] == found.step.grad_bytes
