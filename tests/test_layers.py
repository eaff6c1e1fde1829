"""Style, types and import layers, as the project's own tools judge them; one command runs everything."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
_LAYERS = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
TOOLS = {
    "ruff check": ["-m", "ruff", "check", "."],
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "mypy --strict": ["-m", "mypy"],
    "import layers": ["-c", _LAYERS],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tree_is_clean(tool: str) -> None:
    done = subprocess.run([sys.executable, *TOOLS[tool]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
