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


def torchtune() -> tuple[str, Iterable[str]]:
    """The keys of the fine-tuning recipes' example configs and programs, and the arguments of the LoRA builders."""
    import inspect
    import re
    from pathlib import Path

    import torchtune
    import yaml
    from torchtune.models import llama3_1

    recipes = Path(torchtune.__path__[0]).parent / "recipes"

    found: set[str] = {f"model.{name}" for name in inspect.signature(llama3_1.lora_llama3_1_8b).parameters}
    for path in (*recipes.glob("full_finetune_*.py"), *recipes.glob("lora_finetune_*.py")):
        found |= set(re.findall(r"cfg\.get\(\s*\"(\w+)\"", path.read_text()))
        found |= set(re.findall(r"\bcfg\.([a-z]\w*)\b", path.read_text())) - {"get", "model"}
    for path in (recipes / "configs").glob("*/*.yaml"):
        if re.fullmatch(r"[\d.]+B_(full|q?lora|q?dora)(_single_device|_low_memory)?", path.stem):
            found |= set(yaml.safe_load(path.read_text())) - {"model"}
    how = "keys of the fine-tuning recipes and their configs; of model, the arguments of lora_llama3_1_8b"
    return _head("torchtune", how), found | {"model._component_"}


def litgpt() -> tuple[str, Iterable[str]]:
    import inspect

    from litgpt.args import EvalArgs, LogArgs, TrainArgs
    from litgpt.finetune import full, lora

    found = {name for setup in (full.setup, lora.setup) for name in inspect.signature(setup).parameters}
    for name, cls in {"train": TrainArgs, "eval": EvalArgs, "log": LogArgs}.items():
        found = (found - {name}) | {f"{name}.{field.name}" for field in dataclasses.fields(cls)}
    how = "the arguments of setup in litgpt/finetune/lora.py and full.py, and the fields of their dataclasses"
    return _head("litgpt", how), found


def unsloth() -> tuple[str, Iterable[str]]:
    from unsloth_cli.config import Config

    sections = {name: getattr(field.annotation, "model_fields", None) for name, field in Config.model_fields.items()}
    nested = {f"{name}.{key}" for name, fields in sections.items() if fields for key in fields}
    return _head("unsloth", "the fields of unsloth_cli.config.Config"), nested | {"model"}


def _head(package: str, how: str) -> str:
    return f"# {package} {version(package)}, {DATE}, {how}"


EXTRACTORS: dict[str, Callable[[], tuple[str, Iterable[str]]]] = {
    "trl": trl,
    "hf_script": hf_script,
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "swift": swift,
    "torchtune": torchtune,
    "litgpt": litgpt,
    "unsloth": unsloth,
}

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        head, found = EXTRACTORS[sys.argv[1]]()
    print("\n".join([head, *sorted(found)]))
