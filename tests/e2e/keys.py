"""The keys that a trainer's config may have, from the installed trainer: `python tests/e2e/keys.py trl`.

Run with the interpreter of the trainer's environment; prints the text of `peftplan/trainers/keys/NAME.txt`. Needs
nothing of this repository.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version

DATE = "2026-11-21"


def trl() -> tuple[str, Iterable[str]]:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

    classes = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    keys = {field.name for cls in classes for field in dataclasses.fields(cls)}
    return _head("trl", "the fields of the dataclasses that trl/scripts/sft.py parses"), keys


def hf_script() -> tuple[str, Iterable[str]]:
    """Of the script's own CONFIG, only what transformers decides: the training arguments."""
    from transformers import TrainingArguments

    keys = {f"arguments.{field.name}" for field in dataclasses.fields(TrainingArguments)}
    return _head("transformers", "the fields of TrainingArguments; the rest are the script's own"), keys


def _head(package: str, how: str) -> str:
    return f"# {package} {version(package)}, {DATE}, {how}"


EXTRACTORS: dict[str, Callable[[], tuple[str, Iterable[str]]]] = {"trl": trl, "hf_script": hf_script}

if __name__ == "__main__":
    head, found = EXTRACTORS[sys.argv[1]]()
    print("\n".join([head, *sorted(found)]))
