"""What the tests of trainers share: tiny models and data, written once per environment that reads them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import tiny

Assets = Callable[[Path], Path]


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Assets:
    """`assets(python)` is a folder of `tests/e2e/tiny.py`, written by that interpreter's transformers."""
    known: dict[Path, Path] = {}

    def folder_of(python: Path) -> Path:
        if python not in known:
            known[python] = tmp_path_factory.mktemp("tiny")
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
            subprocess.run([str(python), str(tiny.__file__), str(known[python])], check=True, env=environment)
        return known[python]

    return folder_of


@pytest.fixture(scope="session")
def own_python() -> Path:
    """The interpreter that runs the tests: TRL, transformers and PEFT are installed beside it."""
    return Path(sys.executable)
