"""Every method that the installed PEFT has trains as many parameters as PEFT says, on three architectures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("peft")

from peftplan import methods, plugins
from peftplan.errors import PeftplanError, RequestError
from peftplan.instruments.trace import parameters, trace
from peftplan.pipeline import estimate
from tests.conformance import zoo
from tests.test_completeness import peft_types

MODELS = ("grouped", "tied with biases", "window", "scaled embedding")


def rows() -> Iterator[Any]:
    """Every example of every method's file: its defaults, and other settings."""
    for name in methods.names():
        if name in peft_types():
            examples = plugins.load(methods.__name__, "method", name).EXAMPLES
            yield from (pytest.param(name, zoo.settings("method", made), id=f"{name}-{made}") for made in examples)


@pytest.mark.trace
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("method", "settings"), list(rows()))
def test_the_counts_are_pefts(method: str, settings: dict[str, Any], model: str) -> None:
    job = zoo.job(model, {"method": method, "set": settings})
    try:
        found = estimate(job).parameters
    except RequestError:
        with pytest.raises(PeftplanError):  # some are put on and then do not run
            trace(job)
        return
    assert {"total": found.total, "trainable": found.trainable} == parameters(job)


def test_every_type_that_is_modelled_by_its_own_file_is_counted() -> None:
    counted = {row.values[0] for row in rows()}
    assert counted == peft_types() & set(methods.names())
