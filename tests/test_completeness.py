"""Every PEFT method is modelled, or says why it is not."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("peft")

from peftplan import methods
from peftplan.arch.families import families
from peftplan.errors import Unsupported
from peftplan.job import make_job
from peftplan.methods import UNMODELLED
from peftplan.methods._unmodelled import OF_PAPERS
from peftplan.pipeline import estimate


def peft_types() -> frozenset[str]:
    """The installed PEFT's methods, by their lower-case names."""
    from peft import PeftType

    return frozenset(kind.value.lower() for kind in PeftType)


def modelled() -> frozenset[str]:
    return frozenset({*methods.names(), *methods.aliases()})


def test_every_peft_type_is_a_method_or_says_why_not() -> None:
    missing = sorted(peft_types() - modelled() - UNMODELLED.keys())
    assert missing == [], f"neither modelled nor listed in peftplan/methods/_unmodelled.py: {', '.join(missing)}"


def test_what_is_modelled_is_not_listed_as_unmodelled() -> None:
    assert sorted(modelled() & UNMODELLED.keys()) == []


def test_what_is_listed_is_a_method_of_peft() -> None:
    assert sorted(UNMODELLED.keys() - peft_types()) == []
    assert all(len(reason) > 20 for reason in UNMODELLED.values())


def test_targets_are_pefts_where_the_job_names_none() -> None:
    from peft.utils import constants

    theirs = {
        match[1].lower().replace("lntuning", "ln_tuning"): getattr(constants, name)
        for name in dir(constants)
        if (match := re.fullmatch(r"TRANSFORMERS_MODELS_TO_(\w+)_TARGET_MODULES_MAPPING", name))
    }
    for name in sorted(theirs.keys() & set(methods.names())):
        method = methods.make(name, methods.example(name))
        own = {family: method.default_targets(family) for family in families()}
        elsewhere = {found for family, found in own.items() if family not in theirs[name]}
        assert elsewhere <= {"all-linear" if name == "osf" else None}, name  # osf/model.py, _prepare_adapter_config
        assert all(own[family] == tuple(theirs[name][family]) for family in own.keys() & theirs[name]), name


@pytest.mark.parametrize("name", sorted(UNMODELLED))
def test_asking_for_one_says_why(name: str) -> None:
    with pytest.raises(Unsupported, match="not modelled") as caught:
        estimate(make_job(model="llama-7b", method=name))
    assert UNMODELLED[name] in str(caught.value)


@pytest.mark.parametrize("name", sorted(OF_PAPERS))
def test_a_method_of_a_paper_says_why_not(name: str) -> None:
    with pytest.raises(Unsupported, match="not modelled"):
        estimate(make_job(model="llama-7b", method=name))
    assert name not in modelled()


def test_what_is_no_method_says_what_it_is() -> None:
    with pytest.raises(Unsupported, match=r"keeps nothing for backward.*price the method without it"):
        estimate(make_job(model="llama-7b", method="neftune"))


def test_most_of_peft_is_modelled() -> None:
    assert len(peft_types() & modelled()) >= 2 * len(UNMODELLED)
