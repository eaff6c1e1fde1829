"""The options of a job, declared once and shared by every command that takes a job."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from peftplan.cli import complete
from peftplan.errors import RequestError
from peftplan.job import Job, make_job

MODEL, METHOD, TRAINING, MACHINE, FILES = "Model", "Method", "Training", "Machine", "Files and output"
LIMITS = "Limits"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.", rich_help_panel=FILES)]


def _option(
    flag: str, group: str, metavar: str, help_text: str, completion: Callable[[str], list[str]] | None = None
) -> Any:
    field = Job.model_fields.get(flag.removeprefix("--").replace("-", "_"))
    default = f" Default {field.default}." if field and isinstance(field.default, (str, int)) else ""
    return typer.Option(
        flag, help=help_text + default, rich_help_panel=group, autocompletion=completion, metavar=metavar
    )


FILE_FIELDS = ("job_file", "config_file", "adapter_config")
Text = str | None
"""As typed; Job turns it into a number and judges it, so that files, Python and options are judged alike."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """A job as typed: None where the option was not given, so that a job file or the default decides.

    Named like Job's fields, plus the files and `assignments`.
    """

    model: Annotated[
        Text,
        _option("--model", MODEL, "NAME", "Catalog alias, Hub id, folder or config.json.", complete.models),
    ] = None
    format: Annotated[
        Text, _option("--format", MODEL, "NAME", "Weight format of the frozen base.", complete.formats)
    ] = None
    dtype: Annotated[
        Text, _option("--dtype", MODEL, "DTYPE", "Element type the weights are loaded in.", complete.dtypes)
    ] = None
    attention: Annotated[Text, _option("--attention", MODEL, "NAME", "Attention implementation: sdpa, eager, ...")] = (
        None
    )
    kernels: Annotated[Text, _option("--kernels", MODEL, "NAME", "Kernel set for loss, norm and feed-forward.")] = None

    method: Annotated[Text, _option("--method", METHOD, "NAME", "full, lora, qlora, dora, ...", complete.methods)] = (
        None
    )
    rank: Annotated[Text, _option("--rank", METHOD, "N", "Rank of the adapter.")] = None
    target_modules: Annotated[
        Text, _option("--target-modules", METHOD, "NAMES", "Modules to adapt: q_proj,v_proj or all-linear.")
    ] = None
    adapter_dtype: Annotated[
        Text,
        _option("--adapter-dtype", METHOD, "DTYPE", "Element type of the adapter, or auto.", complete.dtypes),
    ] = None
    assignments: Annotated[
        list[str] | None,
        _option(
            "--set",
            METHOD,
            "KEY=VALUE",
            "Any other knob, repeatable: method.lora_dropout=0.1, model.use_cache=false.",
            complete.prefixes,
        ),
    ] = None

    task: Annotated[Text, _option("--task", TRAINING, "NAME", "train, generate or serve.", complete.tasks)] = None
    precision: Annotated[
        Text, _option("--precision", TRAINING, "NAME", "bf16, bf16-mixed, fp32, ...", complete.precisions)
    ] = None
    optimizer: Annotated[
        Text, _option("--optimizer", TRAINING, "NAME", "Optimizer, such as adamw.", complete.optimizers)
    ] = None
    micro_batch: Annotated[Text, _option("--micro-batch", TRAINING, "N", "Sequences per GPU and forward pass.")] = None
    seq_len: Annotated[Text, _option("--seq-len", TRAINING, "N", "Tokens per sequence.")] = None
    grad_accum: Annotated[Text, _option("--grad-accum", TRAINING, "N", "Micro-batches per optimizer step.")] = None
    batching: Annotated[
        Text,
        _option("--batching", TRAINING, "NAME", "padded, packed or exact (equal lengths).", complete.batchings),
    ] = None
    recompute: Annotated[
        Text,
        _option(
            "--recompute",
            TRAINING,
            "NAME",
            "Activation checkpointing: none, full, every_n, selective, unsloth.",
            complete.recomputes,
        ),
    ] = None
    tokens: Annotated[
        Text, _option("--tokens", TRAINING, "N", "Tokens to train on, for the cost of the whole run.")
    ] = None

    gpu: Annotated[Text, _option("--gpu", MACHINE, "NAME", "GPU model to fit on.", complete.gpus)] = None
    gpus: Annotated[Text, _option("--gpus", MACHINE, "N", "GPUs per node.")] = None
    nodes: Annotated[Text, _option("--nodes", MACHINE, "N", "Nodes.")] = None
    layout: Annotated[Text, _option("--layout", MACHINE, "LAYOUT", "Parallel layout: zero3, fsdp, tp=2,dp=4, ...")] = (
        None
    )
    offload: Annotated[Text, _option("--offload", MACHINE, "NAME", "What is kept in host memory: activations.")] = None
    backend: Annotated[
        Text,
        _option("--backend", MACHINE, "NAME", "Whose kernel rules apply: cuda or cpu.", complete.backends),
    ] = None
    usd_per_hour: Annotated[
        Text, _option("--usd-per-hour", MACHINE, "USD", "Price of one GPU; else the catalog's median.")
    ] = None

    job_file: Annotated[
        Path | None,
        _option("--job", FILES, "FILE", "A job (YAML or JSON) or an estimate's JSON; options override it."),
    ] = None

    config_file: Annotated[
        list[Path] | None,
        _option(
            "--config",
            FILES,
            "FILE",
            "A trainer's own config (Axolotl, TRL, ...); options override it. Repeat for accelerate's or DeepSpeed's.",
        ),
    ] = None
    adapter_config: Annotated[
        Path | None,
        _option("--adapter-config", FILES, "FILE", "PEFT's adapter_config.json: the method and all its knobs."),
    ] = None

    def job(self) -> Job:
        """The Job that the files and the options describe together. Raises RequestError."""
        return self.over(self._stated())

    def over(self, stated: dict[str, Any]) -> Job:
        """The Job that the options make of one that a file states. Raises RequestError."""
        from peftplan.cli import jobfile

        merged = self._given()
        if self.adapter_config:
            merged = jobfile.override(jobfile.read_adapter(self.adapter_config), merged)
        merged = jobfile.override(stated, merged)
        if "model" not in merged:
            raise RequestError("--model is missing; name one (`peftplan list models`) or give --job or --config FILE")
        return make_job(**merged)

    def _stated(self) -> dict[str, Any]:
        from peftplan.cli import jobfile

        if self.job_file and self.config_file:
            raise RequestError("--job and --config both state a whole job; give one of them")
        if self.config_file:
            return jobfile.read_trainer(self.config_file)
        return jobfile.read(self.job_file) if self.job_file else {}

    @property
    def said(self) -> str:
        """The options as one would type them, without the files that state a whole job."""
        given = self._given()
        pairs = [*given.pop("set", {}).items(), *given.items()]
        adapter = [f"--adapter-config {self.adapter_config}"] if self.adapter_config else []
        return " ".join([*adapter, *(f"--{key.replace('_', '-')} {value}" for key, value in pairs)])

    def _given(self) -> dict[str, Any]:
        from peftplan.cli import jobfile

        named = {f.name: getattr(self, f.name) for f in fields(self)}
        for file in FILE_FIELDS:
            del named[file]
        assignments = named.pop("assignments") or []
        given = {name: value for name, value in named.items() if value is not None}
        return {**given, "set": jobfile.assignments(assignments)} if assignments else given


def takes_job(command: Callable[..., str]) -> Callable[..., str]:
    """`command(job, ...)` as typer should see it: with every option of a job in place of `job`."""
    return _with_options(command, JobOptions.job)


def takes_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command(options, ...)` as typer should see it: with every option of a job in place of the JobOptions."""
    return _with_options(command, lambda options: options)


def _with_options(command: Callable[..., Any], make: Callable[[JobOptions], object]) -> Callable[..., Any]:
    """`command` with every option of a job in place of its first parameter, which is what `make` makes of them."""
    shared = _job_parameters()
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    names = [p.name for p in shared]

    def run(**values: Any) -> Any:
        options = JobOptions(**{name: values.pop(name) for name in names})
        return command(make(options), **values)

    parameters = [*shared, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _job_parameters() -> list[inspect.Parameter]:
    hints = get_type_hints(JobOptions, include_extras=True)
    return [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(JobOptions)
    ]


class Sections(TyperCommand):
    """A command whose help lists its options under headings."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(_section(param), []).append(record)
        for title in sorted(sections, key=_ORDER.index):
            with formatter.section(title):
                formatter.write_dl(sections[title])


_ORDER = ["Arguments", LIMITS, "Which", MODEL, METHOD, TRAINING, MACHINE, FILES]


def _section(param: Any) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    return getattr(param, "rich_help_panel", None) or FILES
