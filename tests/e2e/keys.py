"""The keys that pinned versions of trainers know: `PYTHON keys.py axolotl > peftplan/trainers/keys/axolotl.txt`.

Run with the interpreter of the trainer's own environment (`tests/e2e/venvs.py`); needs nothing of this repository.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from typing import Any, get_args


def axolotl() -> Iterator[str]:
    """Fields and aliases of AxolotlInputConfig and of the plugins' own arguments, nested models' dotted."""
    from axolotl.integrations.cut_cross_entropy.args import CutCrossEntropyArgs
    from axolotl.integrations.liger.args import LigerArgs
    from axolotl.integrations.spectrum.args import SpectrumArgs
    from axolotl.utils.schemas.config import AxolotlInputConfig

    for schema in (AxolotlInputConfig, LigerArgs, CutCrossEntropyArgs, SpectrumArgs):
        yield from _fields(schema)


def _fields(schema: Any) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        names = {name, field.alias} - {None}
        yield from names
        for inner in (t for t in (field.annotation, *get_args(field.annotation)) if hasattr(t, "model_fields")):
            yield from (f"{outer}.{key}" for outer in names for key in inner.model_fields)


def llamafactory() -> Iterator[str]:
    """Fields of the dataclasses that get_train_args parses into."""
    from llamafactory.hparams.parser import _TRAIN_ARGS

    for arguments in _TRAIN_ARGS:
        yield from (field.name for field in dataclasses.fields(arguments) if field.init)


def swift() -> Iterator[str]:
    """Fields of SftArguments; a block ENV sets environment variables."""
    from swift.arguments import SftArguments

    yield "ENV"
    yield from (field.name for field in dataclasses.fields(SftArguments) if field.init)


TRAINERS = {"axolotl": (axolotl, "axolotl"), "llamafactory": (llamafactory, "llamafactory"), "swift": (swift, "ms-swift")}


def listing(name: str) -> str:
    """The file's content."""
    extract, package = TRAINERS[name]
    with contextlib.redirect_stdout(sys.stderr):
        names = sorted(set(extract()))
    head = f"# {package} {version(package)}, {date.today()}, {(extract.__doc__ or '').strip()}"
    return "\n".join([head, *names]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(listing(sys.argv[1]))
