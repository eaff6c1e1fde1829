"""The trainers' own parsers: `PYTHON parsers.py axolotl FILE...` prints {file: null, or what it objects to} as JSON.

Run with the interpreter of the trainer's own environment; needs nothing of this repository. A machine without a GPU
is presented as one that has bf16 and flash attention, since what is asked is whether the keys are right.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml


def axolotl() -> Callable[[dict[str, Any]], object]:
    config, dictionary = import_module("axolotl.utils.config"), import_module("axolotl.utils.dict")
    gpu = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_80"}
    prepare = import_module("axolotl.cli.config").prepare_plugins

    def parse(keys: dict[str, Any]) -> object:
        stated = dictionary.DictDefault(keys)
        prepare(stated)
        return config.validate_config(stated, capabilities=gpu, env_capabilities={"torch_version": "2.13.0"})

    return parse


def llamafactory() -> Callable[[dict[str, Any]], object]:
    parser: Any = import_module("llamafactory.hparams.parser")
    parser.is_torch_bf16_gpu_available = lambda: True
    parser.check_version = lambda *_, **__: None
    _with_bf16()

    def parse(keys: dict[str, Any]) -> object:
        return parser.get_train_args(dict(keys))

    return parse


def swift() -> Callable[[dict[str, Any]], object]:
    arguments, utils = import_module("swift.arguments"), import_module("swift.utils")
    _with_bf16()

    def parse(keys: dict[str, Any]) -> object:
        stated, left = utils.parse_args(arguments.SftArguments, _words(keys))
        if left:  # swift/pipelines/base.py refuses them
            raise ValueError(f"not known: {left}")
        return stated

    return parse


def trl() -> Callable[[dict[str, Any]], object]:
    make_parser = import_module("trl.scripts.sft").make_parser
    _with_bf16()

    def parse(keys: dict[str, Any]) -> object:
        return make_parser().parse_dict(dict(keys), allow_extra_keys=False)

    return parse


def _words(keys: dict[str, Any]) -> list[str]:
    """A YAML's keys as the command line that `swift sft FILE` makes of them (swift/utils/utils.py)."""
    words: list[str] = []
    for key, value in keys.items():
        if key == "ENV":
            continue
        listed = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{key}", *(str(part).lower() if isinstance(part, bool) else str(part) for part in listed)]
    return words


def _with_bf16() -> None:
    arguments: Any = import_module("transformers.training_args")
    arguments.is_torch_bf16_gpu_available = lambda: True


PARSERS = {"axolotl": axolotl, "llamafactory": llamafactory, "swift": swift, "trl": trl}


def objections(name: str, files: list[str]) -> dict[str, str | None]:
    parse = PARSERS[name]()
    return {file: _objection(parse, file) for file in files}


def _objection(parse: Callable[[dict[str, Any]], object], file: str) -> str | None:
    try:
        parse(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        answer = objections(sys.argv[1], sys.argv[2:])
    print(json.dumps(answer))
