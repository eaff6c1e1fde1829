"""What the tests of every trainer ask: there and back again, known keys, the configs of the trainers' own examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftplan import trainers
from peftplan.errors import RequestError
from peftplan.job import Job
from peftplan.trainers import Run
from peftplan.trainers.base import _BEHAVIOUR, decided, fields_of, known_keys
from peftplan.trainers.rules import Inexpressible, flatten

CONFIGS = Path(__file__).parent / "configs"
ALSO_SAID = {
    "format.double_quant", "method.lora_alpha", "method.lora_dropout", "method.vera_dropout", "adapter_dtype",
    "format.prepare", "format.compute_dtype", "method.layers", "method.oft_block_size", "method.n_frequency",
    "method.boft_block_size", "method.boft_block_num", "method.boft_n_butterfly_factor", "method.boft_dropout",
    "method.activated_layers", "method.step_interval", "method.num_new_blocks",
    "method.restart_steps", "method.cpu_offload",
}  # fmt: skip
"""What a written config says of a job that is silent on it: a default, or what the trainer does."""


def examples(name: str) -> list[Path]:
    """The trainer's own example configs, re-typed."""
    return sorted((CONFIGS / name).glob("*.yaml"))


def there_and_back(name: str, job: Job) -> None:
    """Writing a job and reading it gives a job that says the same, and is written the same."""
    trainer = trainers.get(name)
    written = trainer.config(job, Run())
    back = trainer.read(written, name="written")
    said, heard = _said(trainer.settled(decided(job), asked=job)), _said(decided(back))
    assert {key: heard.get(key) for key in said} == said
    assert heard.keys() - said.keys() <= ALSO_SAID
    assert trainer.config(back, Run()) == written


def expressible(name: str, job: Job) -> bool:
    try:
        trainers.get(name).config(job, Run())
    except (Inexpressible, RequestError):
        return False
    return True


def unknown_keys(name: str, config: dict[str, Any]) -> set[str]:
    """Keys that the pinned version does not have."""
    known = known_keys(name)
    assert known, f"no list of keys of {name}"
    heads = known | {key.partition(".")[0] for key in known}
    return {key for key in flatten(config) if key not in known and key.partition(".")[0] not in heads}


def _said(job: Job) -> dict[str, Any]:
    fields = fields_of(job)
    return {key: value for key, value in fields.items() if not key.startswith(_BEHAVIOUR) and key != "model"}
