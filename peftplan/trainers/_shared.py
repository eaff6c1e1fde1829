"""Rules that several trainers' configs share: optimizer names, LoRA's knobs, where the states are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from peftplan import optimizers
from peftplan.errors import RequestError
from peftplan.plugins import canonical
from peftplan.trainers.rules import Config, Fields, Inexpressible, Remarks, Rule, custom

OPTIM = {
    "adamw": "adamw_torch",
    "adamw_torch": "adamw_torch",
    "adamw_foreach": "adamw_torch",
    "adamw_torch_foreach": "adamw_torch",
    "adamw_fused": "adamw_torch_fused",
    "adamw_torch_fused": "adamw_torch_fused",
    "adamw8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
"""peftplan's name: transformers' (training_args.py, OptimizerNames, 5.23.0). `adamw_torch` is foreach on a GPU."""
_NEAREST = (
    ("paged*lion*8bit", "paged_adamw_8bit", "two 8-bit states in place of one; errs high"),
    ("*lion*8bit", "adamw_8bit", "two 8-bit states in place of one; errs high"),
    ("paged*8bit", "paged_adamw_8bit", "two 8-bit states; errs low where it has three"),
    ("*4bit*", "adamw_8bit", "8-bit states in place of 4-bit ones; errs high"),
    ("galore*", "adamw_torch", "full states in place of low-rank ones; errs high"),
    ("q_galore*", "adamw_8bit", "full 8-bit states in place of low-rank ones; errs high"),
    ("apollo*", "adamw_torch", "full states in place of low-rank ones; errs high"),
    ("*8bit*", "adamw_8bit", "two 8-bit states; errs low where it has three"),
    ("*fp8*", "adamw_8bit", "two states of one byte and their scales; errs either way by a few percent"),
    ("flash_adam*", "adamw_8bit", "two 8-bit states; errs either way"),
    ("adafactor", "adamw_torch", "two full states in place of row and column sums; errs high"),
    ("came*", "adamw_torch", "two full states in place of one and row and column sums; errs high"),
    ("*lomo", "adamw_torch", "states and gradients that it does not keep; errs high"),
    ("*lion*", "adamw_torch", "two states in place of one; errs high"),
    ("muon", "adamw_torch", "two states in place of one for matrices; errs high"),
    ("*sgd*", "adamw_torch", "two states in place of at most one; errs high"),
    ("rmsprop*", "adamw_torch", "two states in place of one; errs high"),
    ("adagrad", "adamw_torch", "two states in place of one; errs high"),
    ("ademamix*", "adamw_torch", "two states in place of three; errs low"),
    ("*", "adamw_torch", "errs either way"),
)
"""For optimizers that peftplan has no file of: the nearest one, and which way that errs."""


def optim(key: str, *, default: str) -> Rule:
    """The optimizer by transformers' names. One that peftplan does not know is priced as the nearest it does."""

    def read(config: Config) -> Fields:
        word = config.get(key)
        return {} if word is None else {"optimizer": word if _known(word) else _nearest(word)[0]}

    def write(fields: Fields) -> Config:
        name = canonical(fields["optimizer"])
        if name not in OPTIM and name not in _own_words():
            raise Inexpressible("optimizer", name)
        return {key: OPTIM.get(name, name)}

    def stand_ins(config: Config) -> Remarks:
        word = config.get(key)
        if word is None or _known(word):
            return {}
        name, why = _nearest(word)
        return {key: f"not modelled; priced as {name}: {why}"}

    return custom(
        (key,), ("optimizer",), read=read, write=write, defaults={"optimizer": default}, stand_ins=stand_ins
    )  # fmt: skip


def _own_words() -> set[str]:
    """Optimizers whose name is transformers' too, although no row above says so."""
    return (set(optimizers.names()) | set(optimizers.aliases())) - {"adamw_for_loop"}


def _known(word: Any) -> bool:
    name = canonical(str(word))
    return name in OPTIM or name in _own_words()


def _nearest(word: Any) -> tuple[str, str]:
    name = canonical(str(word))
    return next((near, why) for pattern, near, why in _NEAREST if fnmatchcase(name, pattern))


def knobs(
    pairs: Mapping[str, str],
    *,
    method: str,
    where: Callable[[Config], bool],
    defaults: Fields,
    otherwise: Fields,
) -> Rule:
    """Keys that say a method's settings word for word, where a config has that method (`where`).

    `pairs` are key: field. `defaults` are the trainer's own, `otherwise` what PEFT does where a job is silent: written
    so that the trainer's default does not decide.
    """

    def read(config: Config) -> Fields:
        if not where(config):
            return {}
        given = {field: config[key] for key, field in pairs.items() if config.get(key) not in (None, "", [])}
        return {**defaults, **{field: value for field, value in given.items() if value is not False}}

    def write(fields: Fields) -> Config:
        if fields["method"] != method:
            return {}
        full = {**otherwise, **fields}
        return {key: _plain(full[field]) for key, field in pairs.items() if full.get(field) is not None}

    return custom(tuple(pairs), tuple(pairs.values()), read=read, write=write)


def lora_plus(key: str) -> Rule:
    """LoRA+: the key holds the ratio of the learning rates, which no memory depends on."""

    def read(config: Config) -> Fields:
        return {"variant": "lora_plus"} if config.get(key) else {}

    def write(fields: Fields) -> Config:
        return {key: 16.0} if fields.get("variant") == "lora_plus" else {}

    def stand_ins(config: Config) -> Remarks:
        return {key: None} if config.get(key) else {}

    return custom((key,), ("variant",), read=read, write=write, stand_ins=stand_ins)


def startable(fields: Fields) -> None:
    """Raises Inexpressible for starts of LoRA that no config alone can make: LoftQ, EVA and CorDA want more than a word,
    and PiSSA a base that is not packed."""
    start = str(fields.get("method.init_lora_weights"))
    if start in ("loftq", "eva", "corda", "lora_ga"):
        raise Inexpressible("method.init_lora_weights", start)
    if start.startswith("pissa") and fields.get("format") is not None:
        raise Inexpressible("method.init_lora_weights", f"{start} on {fields['format']}")


def positive(config: Config, key: str) -> int | None:
    """The whole number that a key holds. Raises RequestError for anything else."""
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RequestError(f"{key}: write a whole number of at least 1, not {value!r}")
    return value


def names(value: Any) -> tuple[str, ...]:
    """Module names from a list or from text with commas."""
    parts = value.split(",") if isinstance(value, str) else list(value or ())
    return tuple(str(part).strip() for part in parts if str(part).strip())


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
