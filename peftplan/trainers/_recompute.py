"""Activation checkpointing under the names that trainers give it."""

from __future__ import annotations

from typing import Any

from peftplan.trainers.rules import Config, Fields, Inexpressible, Rule, StandIn, custom, unpriced

NEW, OLD = "activation_checkpointing", "gradient_checkpointing"
ATTENTION = {"recompute": "selective", "recompute.save": ["attention"]}
"""What is kept where a trainer's selective checkpointing keeps attention, and nothing else."""
SETTINGS = ("recompute.every_n", "recompute.save", "recompute.every_second_mm")


def checkpointing(*, default: bool, selects: bool = False, offloads: tuple[str, ...] = ()) -> tuple[Rule, ...]:
    """transformers' `activation_checkpointing`, which goes before its old name `gradient_checkpointing`, with its
    kwargs; not reentrant by default. `selects`: the trainer takes `selective` among them (TRL's SFTTrainer, which keeps
    attention); `offloads` are its own keys that send what the layers run again from to the host."""
    every, picks = _kwargs("every_n_layers"), _kwargs("selective") if selects else ()

    def read(config: Config) -> Fields:
        asked = _first(config, (NEW, OLD))
        if asked is None and default:
            asked = True if _first(config, every) or _first(config, picks) else None
        if not asked:
            return {} if asked is None else {"recompute": "none"}
        if _first(config, picks):
            return ATTENTION
        n = _first(config, every)
        return {"recompute": "full"} if n in (None, 1) else {"recompute": "every_n", "recompute.every_n": n}

    def write(fields: Fields) -> Config:
        kwargs = {} if fields.get("recompute", "none") in ("none", "full") else _policy(fields, selects=selects)
        return {OLD: fields.get("recompute", "none") != "none", **kwargs}

    silent = {"recompute": "full" if default else "none"}
    selective = StandIn(errs="low", because="outputs of products and attention are kept besides")
    return (
        custom((NEW, OLD, *every, *picks), ("recompute", *SETTINGS), read=read, write=write, defaults=silent),
        _flag("recompute.use_reentrant", _kwargs("use_reentrant")),
        _flag("recompute.offload", (*_kwargs("offload"), *offloads)),
        *(unpriced(key, selective) for key in ([] if selects else _kwargs("selective"))),
    )


def _kwargs(name: str) -> tuple[str, str]:
    return f"{NEW}_kwargs.{name}", f"{OLD}_kwargs.{name}"


def _first(config: Config, keys: tuple[str, ...]) -> Any:
    """The first of the keys that is there."""
    return next((config[key] for key in keys if config.get(key) is not None), None)


def _policy(fields: Fields, *, selects: bool) -> Config:
    """A policy of its own as transformers' kwargs. Raises Inexpressible."""
    if fields["recompute"] == "every_n":
        return {f"{OLD}_kwargs.every_n_layers": fields.get("recompute.every_n", 2)}
    if selects and keeps_attention(fields):
        return {f"{OLD}_kwargs.selective": True}
    raise Inexpressible("recompute", fields["recompute"])


def keeps_attention(fields: Fields) -> bool:
    """Whether the policy is selective checkpointing that keeps attention alone."""
    return fields["recompute"] == "selective" and list(fields.get("recompute.save", ())) == ["attention"]


def _flag(field: str, keys: tuple[str, ...]) -> Rule:
    """True where any of the keys is; written as the second of them, transformers' old name."""

    def read(config: Config) -> Fields:
        asked = [config[key] for key in keys if config.get(key) is not None]
        return {field: any(asked)} if asked and (any(asked) or field == "recompute.use_reentrant") else {}

    def write(fields: Fields) -> Config:
        return {keys[1]: fields[field]} if field in fields else {}

    return custom(keys, (field,), read=read, write=write)
