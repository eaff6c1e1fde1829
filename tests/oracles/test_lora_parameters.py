"""LoRA on weights themselves (`target_parameters`) against the traced PEFT model, and on a stack of matrices."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from peftplan.arch import load_arch
from peftplan.errors import PeftplanError, RequestError
from peftplan.graph.builder import Builder, Numerics
from peftplan.graph.core import ACTIVATION, Graph, Region, Tensor
from peftplan.instruments.trace import trace
from peftplan.job import make_job
from peftplan.methods import Host
from peftplan.methods._parameters import OnWeights, adapt_weights
from peftplan.pipeline import read
from peftplan.step.walk.plan import propagate_need
from peftplan.units import DType
from tests.oracles.equal import AGAIN, COMMON, MIXED, PACKED, PLAIN, SIZES, WIDE, assert_equal, name

pytestmark = pytest.mark.trace

WEIGHTS: dict[str, Any] = {"method.target_parameters": ["q_proj.weight", "down_proj.weight"]}
ENDS: dict[str, Any] = {"method.target_parameters": ["embed_tokens.weight", "lm_head.weight"]}
BASES = [
    ("llama_biased", PLAIN),
    ("llama", WIDE),
    ("gemma", AGAIN),
    ("qwen2", MIXED),
    ("llama", {**PLAIN, "adapter_dtype": "bf16"}),
]


def _lora(base: dict[str, Any], targets: list[str] | None = None, /, **settings: Any) -> dict[str, Any]:
    return {"method": "lora", "rank": 4, "target_modules": targets or [], **base, "set": settings}


@pytest.mark.parametrize(("family", "base"), BASES, ids=name)
def test_weights_are_adapted_as_peft_does(family: str, base: dict[str, Any]) -> None:
    assert_equal(family, _lora(base, **WEIGHTS))
    assert_equal(family, _lora(base, **ENDS))


@pytest.mark.parametrize(("family", "base"), BASES[:2], ids=name)
def test_weights_beside_modules_and_several_adapters(family: str, base: dict[str, Any]) -> None:
    counts: dict[str, Any] = {"method.adapters": 3, "method.active_adapters": 2, "method.trained_adapters": 1}
    assert_equal(family, _lora(base, ["v_proj"], **WEIGHTS))
    assert_equal(family, _lora(base, **{**WEIGHTS, **counts}))


def test_a_weight_of_one_layer_has_a_rank_of_its_own() -> None:
    one: dict[str, Any] = {"method.target_parameters": ["layers.1.self_attn.q_proj.weight"]}
    assert_equal("llama", _lora(PLAIN, **{**one, "method.rank_pattern": {"q_proj.weight": 2}}))
    assert_equal("llama", _lora(PLAIN, **{**WEIGHTS, "method.modules_to_save": ["norm"]}))


@pytest.mark.parametrize(
    ("targets", "settings", "said"),
    [
        (["q_proj"], WEIGHTS, "a module or its weight"),
        (None, {"method.target_parameters": ["nothing"]}, "matches nothing"),
        (None, {"method.target_parameters": ["norm.weight"]}, "2 or 3 dimensions"),
        (None, {**WEIGHTS, "method.lora_dropout": 0.1}, "no lora_dropout on weights"),
        (None, {**WEIGHTS, "method.use_dora": True}, "no use_dora on weights"),
        (None, {**WEIGHTS, "method.init_lora_weights": "mica"}, "mica on weights"),
    ],
    ids=str,
)
def test_both_refuse(targets: list[str] | None, settings: dict[str, Any], said: str) -> None:
    fields = {**COMMON, **_lora(PLAIN, targets, **settings)}
    job = make_job(model="llama", config={"model_type": "llama", **SIZES}, **fields)
    with pytest.raises(RequestError, match=said):
        read(job)
    with pytest.raises(PeftplanError):
        trace(job)


def test_packed_weights_are_named_as_modules() -> None:
    with pytest.raises(RequestError, match="in place of a packed weight"):
        read(make_job(model="llama-7b", **_lora(PACKED, **WEIGHTS)))


# -- a stack of matrices --------------------------------------------------------------------------------------------

EXPERTS, OUT, WIDE_IN, TOKENS, RANK = 3, 10, 14, 5, 2


class Experts(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(EXPERTS, OUT, WIDE_IN, dtype=torch.bfloat16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(x, self.weight.transpose(1, 2))


class Around(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts(x)
        return out


def _measured() -> dict[str, int]:
    """What PEFT's model keeps and computes."""
    config = LoraConfig(r=RANK, target_modules=[], target_parameters=["experts.weight"])
    model = get_peft_model(Around(), config)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(EXPERTS, TOKENS, WIDE_IN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), FlopCounterMode(display=False) as forward:
        out = model(x)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "kept": sum(kept.values()),
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
    }


def _predicted() -> dict[str, int]:
    b = Builder(Numerics(backend="cpu"))
    x = Tensor("x", (EXPERTS, TOKENS, WIDE_IN), DType.bfloat16)
    weight = b.weight("experts.weight", EXPERTS, OUT, WIDE_IN, dtype=DType.bfloat16)
    with b.marked("experts"):
        out = b.matmul(x, weight, EXPERTS, TOKENS, OUT, inner=WIDE_IN, label="experts")
    region = Region(name="layers", ops=tuple(b.ops), entry=x, exit=out, first_index=0)
    arch = load_arch("llama-7b")
    host = Host(arch=arch, numerics=b.numerics, adapter_dtype=None, base_dtype=DType.bfloat16, packs=lambda ops: ops)
    on = OnWeights(("experts.weight",), lambda _: RANK, 1, 1, host)
    (adapted,) = adapt_weights(Graph(regions=(region,)), on).regions
    need = propagate_need(adapted, entry_needs=True)
    kept = {t.storage: t.nbytes for op in adapted.ops for t in op.saved(need) if t.kind == ACTIVATION}
    return {
        "trainable": sum(t.numel for t in adapted.params() if t.trainable),
        "kept": sum(kept.values()),
        "forward": sum(op.flops() for op in adapted.ops),
        "backward": sum(op.grad_flops(need) for op in adapted.ops),
    }


def test_a_stack_of_matrices_is_folded_as_peft_does() -> None:
    assert _predicted() == _measured()
