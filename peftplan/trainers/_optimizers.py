"""`optim`, `optim_args` and `optim_target_modules` of transformers' TrainingArguments.

transformers 5.23, training_args.py, OptimizerNames, and trainer_optimizer.py, whose handlers say which arguments each
optimizer takes from `optim_args`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peftplan import datafile, optimizers
from peftplan.errors import RequestError
from peftplan.trainers.rules import Config, Fields, Inexpressible, Rule, StandIn, custom

_FIELDS = ("optimizer", "optimizer.*")
WORDS = (
    "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit",
    "paged_adamw", "adafactor", "sgd", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
    "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
    "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "apollo_adamw",
    "apollo_adamw_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw",
    "schedule_free_sgd", "stable_adamw", "adamw_torch_4bit", "adamw_torch_8bit", "adamw_anyprecision",
)  # fmt: skip
"""What `optim` may say; where two mean the same, the first one is written."""
_LIKE = StandIn(value="adamw", errs="either way", because="two states of a weight's size, other temporaries")
OTHER_OPTIMIZERS: dict[str, StandIn] = dict.fromkeys(
    ("adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused"), _LIKE
)
"""Optimizers of transformers that peftplan has not: priced as the nearest it has."""
_LOW_RANK = frozenset({"rank", "update_proj_gap", "scale", "proj_type"})
_ARGS: dict[str, frozenset[str]] = {
    "galore": _LOW_RANK,
    "apollo": _LOW_RANK | {"proj", "scale_type"},
    "sgd": frozenset({"momentum", "dampening", "weight_decay", "nesterov"}),
    "adagrad": frozenset({"lr_decay", "weight_decay"}),
    "rmsprop": frozenset({"momentum", "alpha", "weight_decay", "centered"}),
    "adamw_low_bit": frozenset({"block_size", "bf16_stochastic_round"}),
    "adamw_anyprecision": frozenset(
        {"use_kahan_summation", "momentum_dtype", "variance_dtype", "compensation_buffer_dtype"}
    ),
    "stable_adamw": frozenset({"kahan_sum", "max_lr", "decouple_lr"}),
}
"""What each takes from `optim_args`."""
_TARGETS = "optimizer.optim_target_modules"
_TARGETED = ("galore", "apollo")


def meaning(word: str) -> dict[str, Any]:
    """What an optimizer's name says in a job's fields."""
    name, implied = optimizers.resolve_name(word)
    return {"optimizer": name, **{f"optimizer.{key}": value for key, value in implied.items()}}


def optimizer(
    key: str = "optim",
    *,
    default: str = "adamw_torch_fused",
    others: Mapping[str, StandIn] | None = None,
    also: tuple[str, ...] = (),
) -> Rule:
    """`optim`: AdamW in torch's fused kernels where nothing is said, since torch 2.8. `others` are a trainer's own,
    `also` those of them that peftplan has."""
    unmodelled, words = {**OTHER_OPTIMIZERS, **(others or {})}, (*WORDS, *also)

    def read(config: Config) -> Fields:
        word = config.get(key)
        if word is None:
            return {}
        if word in words:
            found = meaning(word)
            return {**found, **dict(_arguments(found["optimizer"], config))}
        if word in unmodelled:
            return {"optimizer": unmodelled[word].value}
        raise RequestError(f"{key}: {word!r} is not an optimizer of transformers")

    def write(fields: Fields) -> Config:
        return _written(key, words, fields)

    def stand_ins(config: Config) -> Mapping[str, str]:
        found = unmodelled.get(config.get(key) or "")
        return {} if found is None else {key: found.why("optimizer")}

    def silent(config: Config) -> Fields:
        return {} if config.get(key) else meaning(default)

    keys = (key, "optim_args", "optim_args.*", "optim_target_modules")
    return custom(keys, _FIELDS, read=read, write=write, defaults=silent, stand_ins=stand_ins)


def _arguments(name: str, config: Config) -> Iterator[tuple[str, Any]]:
    """The settings in `optim_args` (`rank=64,scale=0.5`) and `optim_target_modules`."""
    taken = optimizers.get(name).__dataclass_fields__
    pairs = [pair.partition("=")[::2] for pair in str(config.get("optim_args") or "").replace(" ", "").split(",")]
    pairs += [(key.partition(".")[2], str(value)) for key, value in config.items() if key.startswith("optim_args.")]
    yield from ((f"optimizer.{argument}", _typed(value)) for argument, value in pairs if argument in taken)
    targets = config.get("optim_target_modules")
    if targets and name in _TARGETED:
        named = targets if isinstance(targets, str) else tuple(targets)
        if named != taken["optim_target_modules"].default:
            yield _TARGETS, named


def _typed(text: str) -> Any:
    """A setting as YAML reads it; `1e-3` is a number all the same."""
    found = datafile.plain(text)
    return found if isinstance(found, (bool, int, float)) else text


def _said(own: Fields) -> Iterator[tuple[str, Any]]:
    """Settings besides those that say what the name alone says on CUDA."""
    known = optimizers.get(str(own["optimizer"])).__dataclass_fields__
    for name, value in own.items():
        setting = name.partition(".")[2]
        usual = setting in known and value == known[setting].default
        if not usual and (setting, value) != ("impl", "foreach"):
            yield name, value


def _written(key: str, words: tuple[str, ...], fields: Fields) -> Config:
    own = {name: value for name, value in fields.items() if name.partition(".")[0] == "optimizer"}
    if not own:
        return {}
    own = dict(_said(own))
    fitting = [word for word in words if meaning(word).items() <= own.items()]
    word = max(fitting, key=lambda word: len(meaning(word)), default=None)
    left = {name: value for name, value in own.items() if word is not None and name not in meaning(word)}
    targets = left.pop(_TARGETS, ("attn", "mlp")) if own["optimizer"] in _TARGETED else None
    takes = _ARGS.get(str(own["optimizer"]), frozenset())
    if word is None or not {name.partition(".")[2] for name in left} <= takes:
        raise Inexpressible("optimizer", " ".join(f"{name}={value}" for name, value in own.items()))
    arguments = ",".join(f"{name.partition('.')[2]}={value}" for name, value in left.items())
    return {
        key: word,
        **({"optim_args": arguments} if arguments else {}),
        **({"optim_target_modules": targets if isinstance(targets, str) else list(targets)} if targets else {}),
    }
