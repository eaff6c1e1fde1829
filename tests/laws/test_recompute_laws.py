"""What must hold between recompute policies, for every model and job."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from peftplan import RequestError, estimate
from peftplan.job import make_job
from peftplan.result import Estimate
from tests.laws.test_laws import answer, jobs

LAW = settings(deadline=None, max_examples=20, derandomize=True)


def under(fields: dict[str, Any], recompute: str, *, offload: str | None = None, **knobs: Any) -> Estimate:
    settings = {
        **fields["set"],
        "model.use_cache": False,
        **{f"recompute.{key}": value for key, value in knobs.items()},
    }
    return answer({**fields, "set": settings}, recompute=recompute, offload=offload)


@LAW
@given(jobs(("full", "lora", "qlora")))  # a frozen layer keeps nothing but what a checkpoint holds
def test_fewer_checkpointed_layers_keep_more_and_compute_less(fields: dict[str, Any]) -> None:
    order = [under(fields, "full"), *(under(fields, "every_n", every_n=n) for n in (1, 2, 3)), under(fields, "none")]
    kept = [one.memory.saved_for_backward_bytes for one in order]
    again = [one.flops.recompute for one in order]
    assert kept == sorted(kept)
    assert again == sorted(again, reverse=True)
    assert order[0].memory == order[1].memory


@LAW
@given(jobs())
def test_kept_operators_are_not_computed_again(fields: dict[str, Any]) -> None:
    full, attention, most = (
        under(fields, "full"),
        under(fields, "selective", save=["attention"]),
        under(fields, "selective"),
    )
    assert full.flops.recompute >= attention.flops.recompute >= most.flops.recompute
    kept = [one.memory.saved_for_backward_bytes for one in (full, attention, most)]
    assert kept == sorted(kept)


@LAW
@given(jobs())
def test_what_is_offloaded_is_in_host_memory(fields: dict[str, Any]) -> None:
    """A leaf stays on the device beside the copy that comes back: at most one hidden state more, rounded."""
    for recompute in ("full", "every_n"):
        here, there = under(fields, recompute), under(fields, recompute, offload="activations")
        gone = here.memory.saved_for_backward_bytes - there.memory.saved_for_backward_bytes
        layers = fields["config"]["num_hidden_layers"]
        hidden = 4 * fields["micro_batch"] * fields["seq_len"] * fields["config"]["hidden_size"]
        assert 0 <= gone <= layers * hidden
        assert there.memory.peak_bytes <= here.memory.peak_bytes + hidden + 512
        assert (there.memory.host_bytes or 0) - (here.memory.host_bytes or 0) >= gone
        assert there.flops == here.flops


@LAW
@given(jobs())
def test_offloading_everything_keeps_next_to_nothing(fields: dict[str, Any]) -> None:
    here, there = under(fields, "none"), under(fields, "none", offload="activations")
    assert there.memory.saved_for_backward_bytes <= here.memory.saved_for_backward_bytes
    assert there.flops == here.flops


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"recompute": "sometimes"}, "sometimes"),
        ({"recompute": "every_n", "set": {"recompute.every_n": 0}}, "give 1 or more"),
        ({"recompute": "full", "set": {"recompute.every_n": 2}}, "every_n"),
        ({"recompute": "selective", "set": {"recompute.save": []}}, "that is --recompute full"),
        ({"recompute": "selective", "set": {"recompute.save": ["softmax"]}}, "softmax"),
        ({"recompute": "selective", "set": {"recompute.use_reentrant": True}}, "leave it out"),
        ({"recompute": "unsloth", "offload": "activations"}, "offloads by itself"),
        ({"recompute": "full", "set": {"recompute.offload": 1}}, "write true or false"),
    ],
    ids=str,
)
def test_what_no_library_runs_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        estimate(make_job(model="llama-7b", **asked))
