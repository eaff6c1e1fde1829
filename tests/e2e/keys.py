"""The keys that a trainer's config may have, from the installed trainer: `python tests/e2e/keys.py trl`.

Run with the interpreter of the trainer's environment; prints the text of `peftplan/trainers/keys/NAME.txt`. Needs
nothing of this repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import version
from typing import Any, get_args

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


def axolotl() -> tuple[str, Iterable[str]]:
    schemas = {
        "utils.schemas.config": "AxolotlInputConfig",
        "integrations.liger.args": "LigerArgs",
        "integrations.cut_cross_entropy.args": "CutCrossEntropyArgs",
        "integrations.spectrum.args": "SpectrumArgs",
    }
    found = (getattr(import_module(f"axolotl.{module}"), name) for module, name in schemas.items())
    keys = {key for schema in found for key in _nested(schema)}
    return _head("axolotl", "fields of AxolotlInputConfig and of three plugins, aliases and nested ones"), keys


def _nested(schema: Any) -> Iterable[str]:
    for name, field in schema.model_fields.items():
        names = {name, field.alias} - {None}
        yield from names
        for inner in (t for t in (field.annotation, *get_args(field.annotation)) if hasattr(t, "model_fields")):
            yield from (f"{outer}.{key}" for outer in names for key in inner.model_fields)


def llamafactory() -> tuple[str, Iterable[str]]:
    parsed = import_module("llamafactory.hparams.parser")._TRAIN_ARGS
    keys = {field.name for arguments in parsed for field in dataclasses.fields(arguments) if field.init}
    return _head("llamafactory", "fields of the dataclasses that get_train_args parses into"), keys


def swift() -> tuple[str, Iterable[str]]:
    arguments = import_module("swift.arguments").SftArguments
    keys = {field.name for field in dataclasses.fields(arguments) if field.init}
    return _head("ms-swift", "fields of SftArguments; ENV sets environment variables"), keys | {"ENV"}


def _head(package: str, how: str) -> str:
    return f"# {package} {version(package)}, {DATE}, {how}"


EXTRACTORS: dict[str, Callable[[], tuple[str, Iterable[str]]]] = {
    "trl": trl,
    "hf_script": hf_script,
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "swift": swift,
}

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        head, found = EXTRACTORS[sys.argv[1]]()
    print("\n".join([head, *sorted(found)]))
