"""Trains written folders one after the other in one warm interpreter: `python tests/e2e/warm.py FOLDER...`.

TRL, transformers and PEFT are imported once (seconds); each folder is then trained by a fork of that interpreter, which
runs the same main function that the folder's own command ends in. Its exit code is in FOLDER/code, what it printed in
FOLDER/output.log. Needs nothing of this repository; the probe comes through PYTHONPATH.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

import datasets  # noqa: F401
import peft  # noqa: F401
import torch
from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
from trl import SFTTrainer  # noqa: F401
from trl.scripts import sft


def train(folder: Path) -> int:
    """The child's exit code."""
    child = os.fork()
    if child == 0:
        os._exit(_run(folder))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(folder: Path) -> int:
    (folder / "probe").mkdir(exist_ok=True)
    os.environ["PEFTPLAN_PROBE"] = str(folder / "probe")
    os.chdir(folder)
    log = os.open("output.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        _main()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _main() -> None:
    if Path("train.py").is_file():
        runpy.run_path("train.py", run_name="__main__")
    else:
        sft.main(*sft.make_parser().parse_args_and_config(["--config", "sft.yaml"], fail_with_unknown_args=True))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        (Path(name) / "code").write_text(str(train(Path(name))))
