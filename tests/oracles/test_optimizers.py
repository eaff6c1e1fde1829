"""States and temporaries of optimizers against the real ones: equal bytes of states, and of what a step makes.

Other libraries' optimizers are held where they are installed: `pip install -c constraints.txt -e ".[optimizers]"`.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peftplan import optimizers  # noqa: E402
from tests.oracles.optimizer_step import Make, Named, measured, predicted  # noqa: E402

pytestmark = pytest.mark.trace

Case = tuple[str, dict[str, Any], Make]
"""An optimizer's name, its settings, and how the real one is made."""
DTYPES = ("float32", "bfloat16")
GALORE: dict[str, Any] = {"rank": 8, "update_proj_gap": 1, "scale": 0.25, "proj_type": "std"}


def load(package: str, name: str) -> Any:
    """A class of an optional library."""
    pytest.importorskip(package.partition(".")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(package), name)


def real(package: str, name: str, **settings: Any) -> Make:
    """A real optimizer of all weights."""
    return lambda named: load(package, name)(list(named.values()), lr=1e-3, **settings)


def of_torch(name: str, **settings: Any) -> Make:
    return real("torch.optim", name, **settings)


def hidden(name: str, weight: Any) -> bool:
    return weight.ndim == 2 and "embed" not in name and "lm_head" not in name


class Both:
    """Two optimizers that step one after the other."""

    def __init__(self, *inner: Any) -> None:
        self.optimizers = inner

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def muon(**settings: Any) -> Make:
    def make(named: Named) -> Both:
        matrices = [w for name, w in named.items() if hidden(name, w)]
        rest = [w for name, w in named.items() if not hidden(name, w)]
        return Both(torch.optim.Muon(matrices, lr=1e-3, **settings), torch.optim.AdamW(rest, lr=1e-3))

    return make


def schedule_free(name: str, **settings: Any) -> Make:
    def make(named: Named) -> Any:
        optimizer = load("schedulefree", name)(list(named.values()), lr=1e-3, **settings)
        optimizer.train()
        return optimizer

    return make


def mini(named: Named) -> Any:
    return load("adam_mini", "Adam_mini")(named.items(), lr=1e-3, dim=64, n_heads=8, verbose=False)


def projected(package: str, name: str, group: dict[str, Any], **settings: Any) -> Make:
    """transformers' two groups: what is projected comes last."""

    def make(named: Named) -> Any:
        chosen = {name for name in named if hidden(name, named[name])}
        groups = [
            {"params": [w for name, w in named.items() if name not in chosen]},
            {"params": [w for name, w in named.items() if name in chosen], **group},
        ]
        return load(package, name)(groups, lr=1e-3, **settings)

    return make


def galore(name: str, *, settings: dict[str, Any] | None = None, **group: Any) -> Make:
    return projected("galore_torch", name, GALORE | group, **(settings or {}))


def apollo(**group: Any) -> Make:
    return projected("apollo_torch", "APOLLOAdamW", GALORE | {"proj": "random", "scale_type": "channel"} | group)


def q_galore(**group: Any) -> Make:
    """Its own update calls an older bitsandbytes; states and projections are what is asked."""
    whole = GALORE | {"quant_n_bit": 4, "cos_threshold": 0.4, "gamma_proj": 1, "queue_size": 5} | group

    def make(named: Named) -> Any:
        optimizer = projected("q_galore_torch", "QGaLoreAdamW8bit", whole)(named)
        theirs = load("bitsandbytes.optim.optimizer", "Optimizer2State").update_step

        def update_step(group: Any, p: Any, gindex: int, pindex: int, flag_use_float_grad: bool) -> None:
            del flag_use_float_grad
            theirs(optimizer, group, p, gindex, pindex)

        optimizer.update_step = update_step
        optimizer.args.max_unorm = 0.0
        return optimizer

    return make


BNB = "bitsandbytes.optim"
NOT_RELATIVE = {"scale_parameter": False, "relative_step": False}
ALL: dict[str, Any] = {"fp32_embeddings": False}
QUIET = {"no_deprecation_warning": True}
HF = "transformers.optimization"

CASES: list[Case] = [
    ("sgd", {}, of_torch("SGD")),
    ("sgd", {"momentum": 0.9}, of_torch("SGD", momentum=0.9)),
    ("sgd", {"momentum": 0.9, "nesterov": True}, of_torch("SGD", momentum=0.9, nesterov=True)),
    (
        "sgd",
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        of_torch("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    ("sgd", {"weight_decay": 0.1, "impl": "foreach"}, of_torch("SGD", weight_decay=0.1, foreach=True)),
    ("sgd", {"momentum": 0.9, "impl": "fused"}, of_torch("SGD", momentum=0.9, fused=True)),
    ("rmsprop", {}, of_torch("RMSprop")),
    (
        "rmsprop",
        {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
        of_torch("RMSprop", momentum=0.9, centered=True, weight_decay=0.1),
    ),
    ("rmsprop", {"weight_decay": 0.1, "impl": "foreach"}, of_torch("RMSprop", weight_decay=0.1, foreach=True)),
    ("adagrad", {}, of_torch("Adagrad")),
    ("adagrad", {"weight_decay": 0.1}, of_torch("Adagrad", weight_decay=0.1)),
    ("adagrad", {"impl": "foreach"}, of_torch("Adagrad", foreach=True)),
    ("adagrad", {"weight_decay": 0.1, "impl": "foreach"}, of_torch("Adagrad", weight_decay=0.1, foreach=True)),
    ("adamw", {}, of_torch("AdamW")),
    ("adamw", {"impl": "foreach"}, of_torch("AdamW", foreach=True)),
    ("adamw", {"impl": "fused"}, of_torch("AdamW", fused=True)),
    ("adamw", {"amsgrad": True}, of_torch("AdamW", amsgrad=True)),
    ("adafactor", {}, real(HF, "Adafactor", **NOT_RELATIVE)),
    ("adafactor", {"beta1": 0.9}, real(HF, "Adafactor", beta1=0.9, **NOT_RELATIVE)),
    ("adafactor_torch", {}, of_torch("Adafactor")),
    ("adafactor_torch", {"impl": "foreach"}, of_torch("Adafactor", foreach=True)),
    ("muon", {}, muon()),
    ("muon", {"nesterov": False}, muon(nesterov=False)),
    ("adamw_8bit", ALL, real(BNB, "AdamW8bit")),
    ("lion", {}, real(BNB, "Lion")),
    ("lion_8bit", ALL, real(BNB, "Lion8bit")),
    ("ademamix", {}, real(BNB, "AdEMAMix")),
    ("ademamix_8bit", ALL, real(BNB, "AdEMAMix8bit")),
    ("rmsprop_bnb_32bit", {}, real(BNB, "RMSprop32bit")),
    ("rmsprop_bnb_8bit", ALL, real(BNB, "RMSprop8bit")),
    ("schedule_free_adamw", {}, schedule_free("AdamWScheduleFree")),
    ("schedule_free_adamw", {"foreach": False}, schedule_free("AdamWScheduleFree", foreach=False)),
    ("schedule_free_radam", {}, schedule_free("RAdamScheduleFree")),
    ("schedule_free_sgd", {}, schedule_free("SGDScheduleFree")),
    ("stable_adamw", {}, real("optimi", "StableAdamW")),
    ("stable_adamw", {"kahan_sum": False}, real("optimi", "StableAdamW", kahan_sum=False)),
    ("adam_mini", {"dim": 64, "n_heads": 8}, mini),
    ("grokadamw", {}, real("grokadamw", "GrokAdamW")),
    ("galore_adamw", {"rank": 8}, galore("GaLoreAdamW", settings=QUIET)),
    *(
        (
            "galore_adamw",
            {"rank": 8, "proj_type": side},
            galore("GaLoreAdamW", settings=QUIET, proj_type=side),
        )
        for side in ("reverse_std", "left", "right", "full")
    ),
    ("galore_adamw_8bit", {"rank": 8}, galore("GaLoreAdamW8bit")),
    ("galore_adamw_8bit", {"rank": 40}, galore("GaLoreAdamW8bit", rank=40)),
    ("galore_adafactor", {"rank": 8}, galore("GaLoreAdafactor", settings=NOT_RELATIVE)),
    ("q_galore", {"rank": 8, "quant_group_size": 8}, q_galore(quant=True, quant_group_size=8)),
    ("q_galore", {"rank": 8, "quant": False}, q_galore(quant=False, quant_group_size=8)),
    ("apollo_adamw", {"rank": 8}, apollo()),
    ("apollo_mini", {}, apollo(rank=1, scale_type="tensor")),
    ("apollo_adamw", {"rank": 8, "proj": "svd"}, apollo(proj="svd")),
]


def _name(case: Any) -> str | None:
    if isinstance(case, dict):
        return " ".join(f"{key}={value}" for key, value in case.items()) or "plain"
    return case if isinstance(case, str) else "real"


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """GaLore's 8-bit optimizers wait for a GPU after each weight."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "knobs", "make"), CASES, ids=_name)
def test_states_are_equal_and_temporaries_to_a_percent(
    name: str, knobs: dict[str, Any], make: Make, dtype: str
) -> None:
    found, expected = predicted(name, knobs, dtype), measured(make, dtype, steps=6 if "radam" in name else 2)
    assert found.states == expected.states
    assert found.step == pytest.approx(expected.step, rel=0.01)


def master_weights(named: Named) -> Any:
    """What Apex's FP16_Optimizer does, in a few lines: fp32 copies are what AdamW works on."""

    class MasterWeights:
        def __init__(self) -> None:
            self.half = list(named.values())
            self.master = [torch.nn.Parameter(w.detach().float()) for w in self.half]
            self.inner = torch.optim.AdamW(self.master, lr=1e-3)
            self.state = {"inner": self.inner.state, "master": self.master}
            self.param_groups: list[Any] = []

        def step(self) -> None:
            for master, half in zip(self.master, self.half, strict=True):
                master.grad = half.grad.float()
            self.inner.step()
            for master, half in zip(self.master, self.half, strict=True):
                half.data.copy_(master.data)
                master.grad = None

    return MasterWeights()


def test_master_weights_are_fp32_copies_with_fp32_states() -> None:
    found = predicted("adamw_master_weights", {}, "bfloat16")
    assert found == measured(master_weights, "bfloat16")
    assert predicted("adamw_master_weights", {}, "float32") == predicted("adamw", {}, "float32")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("adamw_torch_8bit", ("AdamW8bit", 256)),
        ("adamw_torch_4bit", ("AdamW4bit", 256)),
        ("ao_adamw_4bit", ("AdamW4bit", 128)),
        ("ao_adamw_fp8", ("AdamWFp8", 256)),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_low_bit_states_are_equal(
    name: str, made: tuple[str, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step runs uncompiled here, whose temporaries are not a compiled one's."""

    def as_it_is(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    make = real("torchao.optim", made[0], block_size=made[1])
    assert predicted(name, {}, dtype).states == measured(make, dtype).states


def test_projections_need_names_that_compile() -> None:
    from peftplan.errors import RequestError

    with pytest.raises(RequestError, match="not a regular expression"):
        optimizers.make("galore_adamw", {"optim_target_modules": ("*",)})
