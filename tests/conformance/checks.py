"""What every plug-in must do, one function per promise. A check returns its grade and a note."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple, get_args

from peftplan import formats, kernels, methods, optimizers, plugins
from peftplan.assemble import build_graph
from peftplan.errors import RequestError
from peftplan.graph.blocks.decoder import decoder
from peftplan.graph.core import Graph, verify
from peftplan.methods.base import Family
from peftplan.optimizers.base import Trained
from peftplan.pipeline import estimate
from peftplan.resolve import Case, resolve
from peftplan.units import DType
from tests.conformance import zoo

PASS, NA, MISSING, UNVERIFIED, FAIL = "PASS", "NA", "MISSING", "UNVERIFIED", "FAIL"
KINDS = {"method": methods, "format": formats, "optimizer": optimizers, "kernels": kernels}
_STATELESS = ("lomo",)
"""Optimizers that keep nothing between steps."""
PAIRED = ("grouped", "tied with biases", "round", "fused")
"""What pairs are tried on: sizes that groups of weights divide, or do not; biases; fused layers."""
_SECTIONS = ("Trains:", "Keeps for backward:", "Not modelled:")


class Member(NamedTuple):
    """One file of a plug-in folder."""

    kind: str
    name: str
    module: ModuleType

    @property
    def examples(self) -> tuple[Any, ...]:
        return getattr(self.module, "EXAMPLES", ())

    def asked(self, example: Any) -> dict[str, Any]:
        """The job fields that ask for an example."""
        return {self.kind: self.name, "set": zoo.settings(self.kind, example)}


def found(kind: str, name: str) -> Member:
    """The file `name` of a folder."""
    return Member(kind, name, plugins.load(KINDS[kind].__name__, kind, name))


class Grade(NamedTuple):
    grade: str
    note: str = ""


def describes(member: Member) -> Grade:
    """The file says in its first line what it is, and a method what it trains, keeps and leaves out."""
    text = member.module.__doc__ or ""
    first = text.strip().splitlines()[0] if text.strip() else ""
    if len(first) < 20:
        return Grade(MISSING, "a docstring whose first line is a description")
    absent = [section for section in _SECTIONS if member.kind == "method" and section not in text]
    return Grade(MISSING, ", ".join(absent)) if absent else Grade(PASS)


def declares(member: Member) -> Grade:
    """The file names its class, examples of it, and what of it nobody has verified."""
    wanted = (member.kind.upper(), "EXAMPLES", "UNVERIFIED")
    absent = [name for name in wanted if name not in vars(member.module)]
    if absent or not member.examples:
        return Grade(MISSING, ", ".join(absent) or "EXAMPLES are empty")
    cls = getattr(member.module, member.kind.upper())
    if member.kind == "method" and getattr(cls, "family", None) not in get_args(Family):
        return Grade(MISSING, "family")
    return Grade(PASS) if all(type(example) is cls for example in member.examples) else Grade(FAIL, "of another class")


def is_a_value(member: Member) -> Grade:
    """Examples are frozen and equal by value, and a job's settings make them again."""
    for example in member.examples:
        if not type(example).__dataclass_params__.frozen or dataclasses.replace(example) != example:
            return Grade(FAIL, f"{example} is not a frozen value")
        knobs = {key.partition(".")[2]: value for key, value in member.asked(example)["set"].items()}
        if KINDS[member.kind].make(member.name, knobs) != example:
            return Grade(FAIL, f"settings do not make {example}")
    return Grade(PASS)


def applies(member: Member) -> Grade:
    """Every example works on some of the zoo, and on every model it works or is refused in a line."""
    if member.kind == "optimizer":
        return Grade(NA)
    if reason := _untrainable(member):
        return Grade(NA, reason)
    for example in member.examples:
        done = [model for model in zoo.MODELS if _case_and_graph(member, example, model) is not None]
        if not done:
            return Grade(FAIL, f"{example} works on no model")
    return Grade(PASS)


def is_pure(member: Member) -> Grade:
    """Applying changes nothing it was given: doing it twice, and building what it was given anew, gives the same."""
    if member.kind == "optimizer":
        return Grade(NA)
    for example, model in _on_all(member):
        made = _case_and_graph(member, example, model)
        if made is None:
            continue
        case, graph = made
        given = decoder(case.arch, case.setup)
        packed = case.format.apply(given, case.compute, case.setup.numerics)
        once, twice = (case.method.apply(packed, case.host) for _ in range(2))
        if not once == twice == graph or given != decoder(case.arch, case.setup):
            return Grade(FAIL, f"{example} on {model}")
    return Grade(PASS)


def verifies(member: Member) -> Grade:
    """The graphs it makes are well-formed."""
    if member.kind == "optimizer":
        return Grade(NA)
    for example, model in _on_all(member):
        made = _case_and_graph(member, example, model)
        for problem in verify(made[1]) if made is not None else ():
            return Grade(FAIL, f"{example} on {model}: {problem}")
    return Grade(PASS)


def composes(member: Member) -> Grade:
    """It works with every member of the folders it meets, or is refused in a line that names the way out."""
    if reason := _untrainable(member):
        return Grade(NA, reason)
    other = {"method": "format", "format": "method", "optimizer": "method", "kernels": "method"}[member.kind]
    refused = []
    for name in KINDS[other].names():
        lines = [_refusal(_both(member, found(other, name)), model) for model in PAIRED]
        said = [line for line in lines if line is not None]
        if any(";" not in line for line in said):
            return Grade(FAIL, f"refuses {name} without a way out: {said[0]}")
        refused += [name] if len(said) == len(lines) else []
    if len(refused) == len(KINDS[other].names()):
        return Grade(FAIL, "works with nothing")
    return Grade(PASS, f"refuses {', '.join(refused)}" if refused else "")


def costs(member: Member) -> Grade:
    """What it stores grows with what it is put on, and never shrinks the count of parameters."""
    grade = _state_costs if member.kind == "optimizer" else _graph_costs
    return grade(member)


CHECKS: dict[str, Callable[[Member], Grade]] = {
    "describes itself": describes,
    "declares": declares,
    "is a value": is_a_value,
    "applies": applies,
    "is pure": is_pure,
    "verifies": verifies,
    "composes": composes,
    "costs": costs,
}


def _untrainable(member: Member) -> str:
    """Why nothing is trained on a format, if nothing is: all of its examples are refused with that reason."""
    reason: str = member.module.FORMAT.untrainable if member.kind == "format" else ""
    if not reason:
        return ""
    asked = [member.asked(example) | {"method": "lora"} for example in member.examples]
    said = [_refusal(one, model) or "" for one in asked for model in zoo.MODELS]
    return reason if all(reason in line for line in said) else ""


def _refusal(asked: dict[str, Any], model: str) -> str | None:
    """Why there is no estimate, None if there is one."""
    try:
        return None if estimate(zoo.job(model, asked)).memory.peak_bytes > 0 else "no peak"
    except RequestError as error:
        return str(error)


def _both(one: Member, other: Member) -> dict[str, Any]:
    """The job fields that ask for the first example of each."""
    mine, theirs = (member.asked(member.examples[0]) for member in (one, other))
    return {**mine, **theirs, "set": {**mine["set"], **theirs["set"]}}


def _on_all(member: Member) -> Iterator[tuple[Any, str]]:
    for example in member.examples:
        for model in zoo.MODELS:
            yield example, model


def _case_and_graph(member: Member, example: Any, model: str) -> tuple[Case, Graph] | None:
    """None where the example is refused: names of modules that the model lacks, weights that do not train."""
    asked = member.asked(example)
    if member.kind == "format":
        asked |= {"method": "lora", "target_modules": ("o_proj", "down_proj")}
    try:
        case = resolve(zoo.job(model, asked))
        return case, build_graph(case)
    except RequestError:
        return None


def _state_costs(member: Member) -> Grade:
    one, three = ([Trained((50, 100), DType.float32, copies, "mlp.up_proj.weight")] for copies in (1, 3))
    for example in member.examples:
        sizes = [sum(s.bytes * s.copies for s in example.states(ws, "cuda")) for ws in (one, three)]
        if member.name in _STATELESS and not any(sizes):
            continue
        if not 0 < sizes[0] < sizes[1] <= 3 * sizes[0]:
            return Grade(FAIL, f"{example}: states of {sizes} bytes")
        if any(example.step_bytes(ws, backend) < 0 for ws in (one, three) for backend in ("cpu", "cuda")):
            return Grade(FAIL, f"{example}: negative temporaries")
    return Grade(PASS)


def _graph_costs(member: Member) -> Grade:
    for example, model in _on_all(member):
        made = _case_and_graph(member, example, model)
        if made is None:
            continue
        case, graph = made
        before = sum(t.numel * n for t, n in decoder(case.arch, case.setup).params())
        after = sum(t.numel * n for t, n in graph.params())
        if after < before or any(t.nbytes <= 0 for t, _ in graph.params()):
            return Grade(FAIL, f"{example} on {model}: {after} parameters of {before}")
    return Grade(PASS)
