"""Shell completion: names only, read as cheaply as their catalogs allow."""

from __future__ import annotations

from typing import get_args

from peftplan.job import Backend, Batching, Task

_DTYPES = ["bfloat16", "float16", "float32", "bf16", "fp16", "fp32"]


def _starting(names: list[str], typed: str) -> list[str]:
    return sorted(name for name in names if name.lower().startswith(typed.lower()))


def models(incomplete: str) -> list[str]:
    from peftplan.arch import catalog

    return _starting([name for model in catalog.models() for name in (model.id, *model.aliases)], incomplete)


def gpus(incomplete: str) -> list[str]:
    from peftplan import hardware

    return _starting([name for gpu in hardware.gpus() for name in (gpu.name, *gpu.aliases)], incomplete)


def methods(incomplete: str) -> list[str]:
    from peftplan import methods as plugins

    return _starting([*plugins.names(), *plugins.aliases()], incomplete)


def formats(incomplete: str) -> list[str]:
    from peftplan import formats as plugins

    return _starting(list(plugins.names()), incomplete)


def optimizers(incomplete: str) -> list[str]:
    from peftplan import optimizers as plugins

    return _starting(list(plugins.names()), incomplete)


def trainers(incomplete: str) -> list[str]:
    from peftplan import trainers as plugins

    return _starting(list(plugins.names()), incomplete)


def launchers(incomplete: str) -> list[str]:
    from peftplan import launchers as plugins

    return _starting(list(plugins.names()), incomplete)


def dtypes(incomplete: str) -> list[str]:
    return _starting(_DTYPES, incomplete)


def precisions(incomplete: str) -> list[str]:
    return _starting(["bf16", "fp16", "fp32", "bf16-mixed", "fp16-mixed"], incomplete)


def prefixes(incomplete: str) -> list[str]:
    from peftplan.cli import jobfile

    return _starting([f"{name}." for name in jobfile.prefixes()], incomplete)


def tasks(incomplete: str) -> list[str]:
    return _starting(list(get_args(Task)), incomplete)


def batchings(incomplete: str) -> list[str]:
    return _starting(list(get_args(Batching)), incomplete)


def recomputes(incomplete: str) -> list[str]:
    from peftplan import recompute

    return _starting([*recompute.names()], incomplete)


def backends(incomplete: str) -> list[str]:
    return _starting(list(get_args(Backend)), incomplete)


def objectives(incomplete: str) -> list[str]:
    return _starting(["cost", "time", "quality", "headroom", "simplicity"], incomplete)


def aims(incomplete: str) -> list[str]:
    return _starting(["best", "smallest_change"], incomplete)


def devices(incomplete: str) -> list[str]:
    return _starting(["meta", "cuda", "cpu"], incomplete)


def listable(incomplete: str) -> list[str]:
    from peftplan.cli.listing import KINDS

    return _starting([*KINDS], incomplete)
