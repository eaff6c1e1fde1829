"""Rules that the YAML trainers share besides those of transformers: a method's settings word for word, LoRA+."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from peftplan.job import Job
from peftplan.trainers import _deepspeed
from peftplan.trainers.rules import Config, Fields, Inexpressible, Kept, Rule, StandIn, custom


def knobs(
    pairs: Mapping[str, str],
    *,
    method: str | tuple[str, ...],
    where: Callable[[Config], bool],
    defaults: Fields | None = None,
    otherwise: Fields | None = None,
) -> Rule:
    """Keys that say a method's settings word for word, where a config has that method (`where`).

    `pairs` are key: field. `defaults` are the trainer's own, `otherwise` what PEFT does where a job is silent: written
    so that the trainer's default does not decide.
    """

    def read(config: Config) -> Fields:
        if not where(config):
            return {}
        given = {field: config[key] for key, field in pairs.items() if config.get(key) not in (None, "", [])}
        return {field: value for field, value in given.items() if value is not False}

    def write(fields: Fields) -> Config:
        if fields["method"] not in ((method,) if isinstance(method, str) else method):
            return {}
        full = {**(otherwise or {}), **fields}
        return {key: _plain(full[field]) for key, field in pairs.items() if full.get(field) is not None}

    def silent(config: Config) -> Fields:
        return (defaults or {}) if where(config) else {}

    return custom(tuple(pairs), tuple(pairs.values()), read=read, write=write, defaults=silent)


def lisa(count: str, interval: str, states: str, *, on: Callable[[Config], bool], also: Config | None = None) -> Rule:
    """LISA: how many layers train at a time, and for how many steps; `states` are those that the trainer's optimizer
    keeps. `also` is written besides."""

    def read(config: Config) -> Fields:
        if not on(config):
            return {}
        kept = {"method.states": states} if states != "active" else {}
        steps = {"method.step_interval": config[interval]} if config.get(interval) is not None else {}
        return {"method.activated_layers": config[count], **kept, **steps}

    def write(fields: Fields) -> Config:
        if fields["method"] != "lisa":
            return {}
        if fields.get("method.states", "active") != states:
            raise Inexpressible("method.states", fields.get("method.states", "active"))
        layers, steps = fields.get("method.activated_layers", 2), fields.get("method.step_interval", 20)
        return {count: layers, interval: steps, **(also or {})}

    keys = (count, interval, *(also or {}))
    return custom(keys, ("method.activated_layers", "method.step_interval", "method.states"), read=read, write=write)


def write_recompute(fields: Fields) -> Config:
    """Checkpointing under transformers' names, with which of its two ways said."""
    if fields["recompute"] == "none":
        return {"gradient_checkpointing": False}
    if fields["recompute"] != "full":
        raise Inexpressible("recompute", fields["recompute"])
    reentrant = fields.get("recompute.use_reentrant", False)
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs.use_reentrant": reentrant}


def lora_plus(key: str) -> Rule:
    """LoRA+: the key holds the ratio of the learning rates, which no memory depends on."""

    def read(config: Config) -> Fields:
        return {"variant": "lora_plus"} if config.get(key) else {}

    def write(fields: Fields) -> Config:
        return {key: 16.0} if fields.get("variant") == "lora_plus" else {}

    def stand_ins(config: Config) -> Kept:
        return {key: None} if config.get(key) else {}

    return custom((key,), ("variant",), read=read, write=write, stand_ins=stand_ins)


def startable(fields: Fields) -> None:
    """Raises Inexpressible for starts of LoRA that no config alone can make: LoftQ, EVA and CorDA want more than a
    word, and PiSSA a base that is not packed."""
    start = str(fields.get("method.init_lora_weights"))
    if start in ("loftq", "eva", "corda", "lora_ga"):
        raise Inexpressible("method.init_lora_weights", start)
    if start.startswith("pissa") and fields.get("format") is not None:
        raise Inexpressible("method.init_lora_weights", f"{start} on {fields['format']}")


def less(because: str) -> StandIn:
    """Of something that takes less than what is priced without it."""
    return StandIn(errs="high", because=because)


def more(because: str) -> StandIn:
    """Of something that takes more than what is priced without it."""
    return StandIn(errs="low", because=because)


def spread(fields: Fields) -> Config:
    """The `deepspeed` key for ZeRO; FSDP and DDP are said elsewhere. Raises Inexpressible."""
    layout = str(fields.get("layout", "ddp"))
    if layout in ("ddp", "fsdp"):
        if layout == "ddp" and fields.get("offload"):
            raise Inexpressible("offload", f"{fields['offload']} with --layout ddp")
        if layout == "fsdp" and fields.get("format") == "int8":
            raise Inexpressible("format", "int8 with --layout fsdp")
        return {}
    return {"deepspeed": f"zero{_deepspeed.stage(layout)}.json"}


def deepspeed_file(job: Job) -> dict[str, str]:
    """The file that `spread` names, where there is one."""
    fields = {"layout": job.layout, "offload": job.offload}
    return {f"{job.layout}.json": _deepspeed.text(fields)} if str(job.layout).startswith("zero") else {}


def names(value: Any) -> tuple[str, ...]:
    """Module names from a list or from text with commas."""
    parts = value.split(",") if isinstance(value, str) else list(value or ())
    return tuple(str(part).strip() for part in parts if str(part).strip())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
