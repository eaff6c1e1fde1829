"""A Python script: AdapterHub's adapters with its AdapterTrainer.

Reads: scripts that peftplan wrote, whose choices are one literal (`CONFIG = {...}`); nothing in them is run.
Writes: the script and the command; one GPU.
Not expressed: of PEFT's methods everything but LoRA on queries, keys, values, `up_proj` and `down_proj`, IA3 whose
vectors scale what the layers give (PEFT's with `feedforward_modules` empty), and prefix tuning without a projection.
adapters has no place for LoRA at `o_proj` and `gate_proj`, no prompt tuning of decoders, and projects prefixes as wide
as the model.
Half-precision weights train under autocast only: adapters are float32 and are not cast (1.3.0, methods/lora.py).
Its own methods (bottleneck adapters and their fusion, its own LoRA, IA3 and prefixes, and unions of these) are written
with every knob; what is fused are folders that `save_adapter` wrote, whose adapters are taken to be like the job's.
Defaults: none; everything that moves memory is in CONFIG. A key of `arguments` that is taken out falls back to
transformers 4.57.6 (training_args.py).
Does: `intermediate_lora` adapts `down_proj` and `output_lora` adapts `up_proj` of Llama's kind of feed-forward.
Of `lora`, `ia3` and `prefix_tuning` PEFT's modules and transformers 5.23's models are priced; adapters 1.3.0 runs
transformers 4.57.6, which could err either way. Its own methods, `hub_lora`, `hub_ia3` and `hub_prefix_tuning` among
them, are priced as it runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any, final

from peftplan import methods
from peftplan.errors import RequestError
from peftplan.job import Job
from peftplan.trainers import _accelerate, _adapterhub, _huggingface, _optimizers, _recompute
from peftplan.trainers.base import Folder, Run, Trainer
from peftplan.trainers.hf_script import literal
from peftplan.trainers.rules import Config, Fields, Inexpressible, always, custom, does, same, under, words
from peftplan.units import parse_dtype

_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
_MLP = {"intermediate_lora": "down_proj", "output_lora": "up_proj"}
_IA3_PLACES = ("k_proj", "v_proj", "down_proj")
_KINDS = ("lora", "ia3", "prefix_tuning")
_FIELDS = (
    "method", "rank", "target_modules", "method.lora_alpha", "method.lora_dropout", "method.feedforward_modules",
    "method.num_virtual_tokens", "method.prefix_projection", *_adapterhub.fields(),
)  # fmt: skip
_ORDER = ("model", "adapter", "base", "adapter_config", "fusion", "quantization", "data", "arguments")


def _read_adapter(config: Config) -> Fields:
    kind = config.get("adapter")
    if isinstance(kind, str) and methods.adapterhub(kind) is not None:
        return _adapterhub.read(config)
    if kind not in _KINDS:
        raise RequestError(f"adapter: {kind!r} is not one of {', '.join((*_KINDS, *_adapterhub.names()))}")
    said = {key.partition(".")[2]: value for key, value in config.items() if key.startswith("adapter_config.")}
    if kind == "prefix_tuning":
        return {"method": kind, "method.num_virtual_tokens": said["prefix_length"]}
    if kind == "ia3":
        return {"method": kind, "target_modules": _IA3_PLACES, "method.feedforward_modules": ()}
    places = [_ATTENTION[letter] for letter in said["attn_matrices"]] if said["selfattn_lora"] else []
    return {
        "method": kind,
        "rank": said["r"],
        "target_modules": (*places, *(name for key, name in _MLP.items() if said[key])),
        "method.lora_alpha": said["alpha"],
        "method.lora_dropout": said["dropout"],
    }


def _write_adapter(fields: Fields) -> Config:
    cls = methods.adapterhub(fields["method"])
    if cls is not None:
        return _adapterhub.write(fields, cls)
    if "variant" in fields:
        raise Inexpressible("method", fields["variant"])
    writers = {"lora": _write_lora, "ia3": _write_ia3, "prefix_tuning": _write_prefix}
    if fields["method"] not in writers:
        raise Inexpressible("method", fields["method"])
    written = writers[fields["method"]](fields)
    kind = fields["method"]
    return {"adapter": kind, "base": kind, **{f"adapter_config.{key}": value for key, value in written.items()}}


def _write_lora(fields: Fields) -> dict[str, Any]:
    names = fields["target_modules"]
    if isinstance(names, str) or not set(names) <= {*_ATTENTION.values(), *_MLP.values()}:
        raise Inexpressible("target_modules", names)
    letters = [letter for letter, name in _ATTENTION.items() if name in names]
    return {
        "r": fields["rank"],
        "alpha": fields.get("method.lora_alpha", 8),
        "dropout": fields.get("method.lora_dropout", 0.0),
        "attn_matrices": letters,
        "selfattn_lora": bool(letters),
        **{key: name in names for key, name in _MLP.items()},
    }


def _write_ia3(fields: Fields) -> dict[str, Any]:
    given = fields.get("method.feedforward_modules")
    if given is None or tuple(given):
        raise Inexpressible("method.feedforward_modules", "PEFT's default" if given is None else given)
    if set(fields["target_modules"]) != set(_IA3_PLACES):
        raise Inexpressible("target_modules", fields["target_modules"])
    return {"attn_matrices": ["k", "v"], "selfattn_lora": True, "intermediate_lora": True, "output_lora": False}


def _write_prefix(fields: Fields) -> dict[str, Any]:
    if fields.get("method.prefix_projection"):
        raise Inexpressible("method.prefix_projection", True)
    return {"prefix_length": fields["method.num_virtual_tokens"], "flat": True}


def _read_precision(config: Config) -> Fields:
    dtype = parse_dtype(str(config.get("model.dtype", "float32"))).label
    return {"dtype": dtype, **_MIXED.read({key: value for key, value in config.items() if "." in key})}


_MIXED = under("arguments.", _huggingface.mixed_precision())


def _write_precision(fields: Fields) -> Config:
    dtype, precision = parse_dtype(fields["dtype"]), str(fields["precision"])
    if dtype.is_half and not precision.endswith("-mixed"):
        raise Inexpressible("precision", f"{precision}: float32 adapters need autocast, as bf16-mixed")
    if fields.get("adapter_dtype", "float32") != "float32":
        raise Inexpressible("adapter_dtype", fields["adapter_dtype"])
    return {"model.dtype": dtype.label, **_MIXED.write(fields)}


def _packed_in_four(fields: Fields) -> Config:
    if fields.get("format") == "int8":
        raise Inexpressible("format", "int8")
    return {}


@final
class Adapters(Trainer):
    name = "adapters"
    title = "AdapterHub's adapters"
    homepage = "https://docs.adapterhub.ml"
    requirements = ("adapters==1.3.0", "transformers==4.57.6", "accelerate==1.15.0", "datasets==5.0.1")
    signature = frozenset(
        {
            "adapter",
            "base",
            "adapter_config.r",
            "adapter_config.attn_matrices",
            "adapter_config.reduction_factor",
            "adapter_config.prefix_tuning",
            "model.name",
        }
    )
    whole = _adapterhub.WHOLE
    dataset_keys = ("data.dataset",)
    proved = (
        "Trained three steps of a tiny Llama on the CPU, from the written script with another model and other rows:"
        " LoRA, IA3, prefix tuning, LoRA on NF4, bottleneck adapters of each kind, its unions and a fusion; trained"
        " counts as predicted, the adapter saved. No GPU."
    )
    harmless = frozenset({f"arguments.{pattern}" for pattern in _huggingface.HARMLESS} | {"data.dataset"})
    rules = (
        same("model.name", "model"),
        custom(("adapter", "base", "adapter_config.*", "fusion.*"), _FIELDS, read=_read_adapter, write=_write_adapter),
        custom(
            ("model.dtype", *_MIXED.keys), ("dtype", "precision", "adapter_dtype"),
            read=_read_precision, write=_write_precision,
        ),
        under("model.", _huggingface.attention()),
        custom((), (), read=lambda _: {}, write=_packed_in_four),
        under("quantization.", _huggingface.bits_and_bytes()),
        does("format.prepare", False, when=lambda config: bool(config.get("quantization.load_in_4bit"))),
        same("data.seq_len", "seq_len"),
        words("data.batching", "batching", {name: name for name in ("padded", "packed", "exact")}),
        *(under("arguments.", rule) for rule in (
            *_huggingface.batches(),
            *_recompute.checkpointing(default=False),
            _optimizers.optimizer(),
            *_huggingface.compiled_and_fused(),
        )),
        always("loop.outputs_until", "loss"),
        always("model.use_cache", False),
    )  # fmt: skip

    def settled(self, full: Job, *, asked: Job) -> Job:
        """`full`, under autocast where the job leaves that open and the weights are of half precision."""
        if asked.precision is not None or not parse_dtype(full.dtype or "float32").is_half:
            return full
        return full.model_copy(update={"precision": f"{full.precision}-mixed"})

    def run_keys(self, run: Run) -> Config:
        return {
            "data.dataset": run.dataset,
            "arguments.output_dir": run.output_dir,
            **({"arguments.num_train_epochs": 1} if run.max_steps is None else {"arguments.max_steps": run.max_steps}),
            "arguments.learning_rate": run.learning_rate,
            "arguments.seed": run.seed,
            "arguments.report_to": [],
            **({"arguments.use_cpu": True} if run.on_cpu else {}),
        }

    def folder(self, job: Job, run: Run) -> Folder:
        if _accelerate.spreads(job):
            raise Inexpressible("gpus", job.gpus * job.nodes)
        return Folder(files={"train.py": script(self.config(job, run))}, command="python train.py", program="train.py")


def script(config: Mapping[str, Any]) -> str:
    """train.py: its own head with this literal, and the transformers script's way of reading rows."""
    scripts = resources.files(__package__).joinpath("scripts")
    head = scripts.joinpath("adapters.txt").read_text("utf-8")
    rows = scripts.joinpath("hf_script.txt").read_text("utf-8").partition("def rows(")[2]
    ordered = {key: config[key] for key in (*_ORDER, *config) if key in config}
    return head.replace("CONFIG = None", f"CONFIG = {literal(ordered)}", 1) + "\n\ndef rows(" + rows


TRAINER = Adapters
