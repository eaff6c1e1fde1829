"""One virtual environment per trainer, built once and kept: their pins contradict each other.

`venv("axolotl")` installs `requirements/axolotl.txt` (after `requirements/axolotl.nodeps.txt`, where there is one,
whose packages come without their dependencies) beside the torch of one environment that all of them see through a
`.pth` file. They live in $PEFTPLAN_VENVS, or the user's cache; one whose requirements changed is built anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import venv as standard
from pathlib import Path

from filelock import FileLock

REQUIREMENTS = Path(__file__).parent / "requirements"
TORCH = "_torch"
"""The environment whose packages the others see; its pins hold for them too."""


def venv(name: str) -> Path:
    """The interpreter of the trainer's environment. Raises CalledProcessError where pip fails."""
    home = _home() / name
    shared = None if name == TORCH else _packages(venv(TORCH))
    wanted = _fingerprint(name)
    _home().mkdir(parents=True, exist_ok=True)
    with FileLock(f"{home}.lock"):
        if not _is_current(home, wanted):
            shutil.rmtree(home, ignore_errors=True)
            _build(home, name, shared)
            (home / "built-from").write_text(wanted, encoding="utf-8")
    return _python(home)


def _home() -> Path:
    stated = os.environ.get("PEFTPLAN_VENVS")
    return Path(stated) if stated else Path.home() / ".cache" / "peftplan" / "venvs"


def _is_current(home: Path, wanted: str) -> bool:
    stamp = home / "built-from"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted


def _fingerprint(name: str) -> str:
    texts = [path.read_text(encoding="utf-8") for path in (*_lists(name), *_lists(TORCH))]
    return hashlib.sha256("\n".join([sys.version, str(_home()), *texts]).encode()).hexdigest()


def _lists(name: str) -> list[Path]:
    """What to install, in this order."""
    return [path for path in (REQUIREMENTS / f"{name}.nodeps.txt", REQUIREMENTS / f"{name}.txt") if path.is_file()]


def _build(home: Path, name: str, shared: Path | None) -> None:
    standard.create(home, with_pip=True)
    if shared is not None:
        (_packages(_python(home)) / "shared-torch.pth").write_text(f"{shared}\n", encoding="utf-8")
    for path in _lists(name):
        alone = ["--no-deps"] if path.name.endswith(".nodeps.txt") else []
        pins = [] if name == TORCH else ["-c", str(REQUIREMENTS / f"{TORCH}.txt")]
        _pip(home, "install", "-q", *alone, *pins, "-r", str(path))


def _pip(home: Path, *words: str) -> None:
    command = [str(_python(home)), "-m", "pip", "--disable-pip-version-check", *words]
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    clean["DS_BUILD_OPS"] = "0"  # DeepSpeed builds the few it needs when they are first used
    subprocess.run(command, check=True, env=clean)


def _python(home: Path) -> Path:
    return home / "bin" / "python"


def _packages(python: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(python.parents[1])}))


if __name__ == "__main__":
    for trainer in sys.argv[1:]:
        print(trainer, venv(trainer))
