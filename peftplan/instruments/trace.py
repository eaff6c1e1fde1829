"""The trace instrument: what the real transformers + PEFT model does in one training step, without weights.

The step is a plain loop's: `outputs = model(**batch); outputs.loss.backward(); optimizer.step();
optimizer.zero_grad()` in training mode, the second of two (the first creates optimizer state), watched by
`recorder.Recorder`. The backend is torch's CPU: operators, what they save, autocast's lists are the CPU's.
`mode="real"` runs the same step on real tensors with random weights; it must give the same answer, and is for
tiny models; a few methods (build.WITH_VALUES) always run so. `loop.outputs_until` says how long the loop holds the
model's outputs (logits, cache): `loss` (as transformers' Trainer), `step` (default; a function's local variable) or
`next` (until the next step's).
"""

from __future__ import annotations

import json
import sys

import torch

from peftplan.arch.core import Arch
from peftplan.errors import BadFile, OutsideError, PeftplanError, RequestError, Unsupported
from peftplan.instruments import adapterhub, build, fakes, placing, prequantized, quantize, ranks, recompute, spread
from peftplan.instruments.answer import Trace
from peftplan.instruments.build import Choices, Mode
from peftplan.instruments.engine import sole_owner
from peftplan.instruments.hooks import quiet
from peftplan.instruments.packers import PACKERS, numel
from peftplan.instruments.step import Step
from peftplan.job import Job, make_job

__all__ = ["Trace", "parameters", "trace"]
MOST_WITH_VALUES = 200_000_000
"""Parameters: random weights of that many are made in a second and take 0.8 GB."""


def trace(job: Job, arch: Arch | None = None, *, mode: Mode = "fake") -> Trace:
    """Trace one steady training step of `job`, whose config is `job.config`, or else `arch`'s.

    Raises RequestError for a job that cannot be built, OutsideError for a step that the libraries cannot run.
    """
    if job.config is None and arch is not None:
        job = job.model_copy(update={"config": arch.model_dump()})
    choices = build.decide(job)
    mode = _mode(choices, mode)
    layout = spread.layout_traced(job)
    sole_owner()
    with quiet(), spread.group(layout):
        model = assembled(choices, mode)
        counts = _count(model)
        if mode == "real":
            return _run(choices, model, mode, counts)
        with fakes.fake_tensors(), quantize.recognised(), adapterhub.sized():
            fakes.to_fake(model)
            model = spread.wrap(model, job, layout, build.decoder_layers(model))
            return _run(choices, model, mode, counts)


def parameters(job: Job) -> dict[str, int]:
    """How many parameters the real adapted model has: `total`, and `trainable` as the libraries count them."""
    choices = build.decide(job)
    with quiet(), spread.group(choices.layout):
        return _count(assembled(choices, _mode(choices, "fake")))


def _mode(choices: Choices, asked: Mode) -> Mode:
    """Real where fake tensors will not do. Raises Unsupported where that would take much memory."""
    if asked == "real" or (choices.method not in build.WITH_VALUES and choices.format not in PACKERS):
        return asked
    total = sum(weight.numel() for weight in build.plain_model(choices, "fake").parameters())
    if total > MOST_WITH_VALUES:
        raise Unsupported(
            f"{choices.method} on {choices.format} depends on the values of weights, which it has for models up to "
            f"{MOST_WITH_VALUES:,} parameters; this one has {total:,}"
        )
    return "real"


def assembled(choices: Choices, mode: Mode, place: torch.device | None = None) -> torch.nn.Module:
    """The adapted model in training mode (see `build.base_model`). Raises RequestError and OutsideError."""
    torch.manual_seed(0)
    try:
        model = build.apply_method(build.base_model(choices, mode, place), choices)
        ranks.mend(model)
        if place is not None:
            placing.bring(model, place)
        if choices.recompute:
            recompute.checkpoint_layers(model, choices.job)
    except (PeftplanError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise OutsideError(f"method {choices.method!r} needs a package: {_line(error)}") from error
    except Exception as error:  # transformers and PEFT report bad requests with whatever class is at hand
        raise RequestError(f"{choices.method!r} on {choices.job.model!r}: {_line(error)}") from error
    return model.train()


def _run(choices: Choices, model: torch.nn.Module, mode: Mode, counts: dict[str, int]) -> Trace:
    try:
        return Step(choices, model, mode).run(counts)
    except PeftplanError:
        raise
    except Exception as error:  # any library below may fail in any way
        raise OutsideError(f"the real model fails in this step: {type(error).__name__}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _count(model: torch.nn.Module) -> dict[str, int]:
    """Parameters as PeftModel.get_nb_trainable_parameters counts them: packed weights by what they stand for."""
    packed = dict(numel(model))
    found = [(packed.get(id(param)), param) for param in model.parameters()]
    sizes = [(quantize.numel(param) if own is None else own, param.requires_grad) for own, param in found]
    total = sum(n for n, _ in sizes) + sum(map(prequantized.numel, model.modules()))
    return {"total": total, "trainable": sum(n for n, trains in sizes if trains)}


def main(argv: list[str]) -> int:
    """`python -m peftplan.instruments.trace JOB.json`: print the Trace as JSON. Returns the exit code."""
    try:
        print(trace(_read_job(argv)).to_json(indent=1))
    except PeftplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _read_job(argv: list[str]) -> Job:
    if len(argv) != 1:
        raise RequestError("usage: python -m peftplan.instruments.trace JOB.json")
    try:
        with open(argv[0], encoding="utf-8") as file:
            fields = json.load(file)
    except (OSError, ValueError) as error:
        raise BadFile(f"cannot read {argv[0]} as a job: {error}") from None
    if not isinstance(fields, dict):
        raise BadFile(f"{argv[0]} holds no JSON object, so no job")
    return make_job(**fields)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
