"""Overheads: the figures add up to what the records show, and an unknown GPU gets an answer that says so."""

from __future__ import annotations

from peftplan.hardware.overheads import cublas_workspace, cuda_context, workspace_bytes
from peftplan.units import MIB

T4, A100, H100 = (7, 5), (8, 0), (9, 0)


def test_two_cublas_workspaces_as_t4_and_a100_runs_show() -> None:
    assert workspace_bytes(T4, biased_linears=False) == workspace_bytes(A100, biased_linears=False)
    assert workspace_bytes(A100, biased_linears=False) == int(16.25 * MIB)


def test_biased_linears_add_a_cublaslt_workspace_each() -> None:
    extra = workspace_bytes(T4, biased_linears=True) - workspace_bytes(T4, biased_linears=False)
    assert extra == 2 * MIB


def test_hopper_takes_32_mib_and_only_hopper() -> None:
    assert cublas_workspace(H100).bytes == 32 * MIB
    assert cublas_workspace((10, 0)).bytes == cublas_workspace(None).bytes == 8_519_680


def test_a_context_says_how_sure_it_is() -> None:
    assert (cuda_context(T4).bytes, cuda_context(T4).standing) == (147_718_144, "measured")
    assert cuda_context((8, 9)).standing == "measured"
    for unmeasured in (A100, H100, None):
        figure = cuda_context(unmeasured)
        assert figure.standing == "recalled"
        assert "either way" in figure.errs
