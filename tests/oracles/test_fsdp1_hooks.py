"""What FSDP1's hook on a frozen unit holds, in torch itself, and what that is in an estimate."""

from __future__ import annotations

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from peftplan import Estimate, estimate  # noqa: E402

pytestmark = pytest.mark.trace


@pytest.mark.parametrize("hooked", [False, True])
def test_a_hook_on_gradients_of_leaves_holds_them_until_it_is_removed(*, hooked: bool) -> None:
    """register_multi_grad_hook as _register_post_backward_reshard_only_hook calls it on a rerun layer's input."""
    leaf = torch.randn(8).detach().requires_grad_(True)
    handle = torch.autograd.graph.register_multi_grad_hook([leaf], lambda _: None) if hooked else None
    (leaf * torch.ones(8)).sum().backward()
    seen, gradient = weakref.ref(leaf), weakref.ref(leaf.grad)
    del leaf
    gc.collect()
    assert (seen() is not None, gradient() is not None) == (hooked, hooked)
    if handle is not None:
        handle.remove()
        assert (seen(), gradient()) == (None, None)


def answer(layers: int, layout: str, *, reentrant: bool) -> Estimate:
    return estimate(
        model="llama-7b", gpus=2, layout=layout, method="lora", recompute="full", micro_batch=2, seq_len=2048,
        batching="exact", attention="flash_attention_2", kernels="liger",
        set={"model.num_hidden_layers": layers, "recompute.use_reentrant": reentrant},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "reentrant", "states"),
    [("fsdp1", True, 2), ("fsdp1", False, 1), ("fsdp2", True, 1), ("fsdp2", False, 1)],
)
def test_each_layer_adds_its_input_and_its_gradient(layout: str, states: int, *, reentrant: bool) -> None:
    """Beyond its weights: the input that its checkpoint holds, and where a hook holds it, the gradient of that."""
    hidden = 2 * 2048 * 4096 * 2
    fewer, more = (answer(n, layout, reentrant=reentrant).memory for n in (8, 12))
    added = more.phases["backward"] - fewer.phases["backward"] - (more.static_bytes - fewer.static_bytes)
    assert round(added / 4 / hidden) == states
