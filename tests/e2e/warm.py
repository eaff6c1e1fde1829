"""Trains written folders one after the other in one warm interpreter: `python tests/e2e/warm.py FOLDER...`.

The trainer is imported once (seconds); each folder is then trained by a fork of that interpreter, which runs the same
main function that the folder's own command ends in. Its exit code is in FOLDER/code, what it printed in
FOLDER/output.log. Needs nothing of this repository; the probe comes through PYTHONPATH.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def _trl() -> Callable[[], object]:
    for name in ("datasets", "peft"):
        import_module(name)
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401
    from trl import SFTTrainer  # noqa: F401
    from trl.scripts import sft

    def main() -> object:
        if Path("train.py").is_file():
            return runpy.run_path("train.py", run_name="__main__")
        return sft.main(*sft.make_parser().parse_args_and_config(["--config", "sft.yaml"], fail_with_unknown_args=True))

    return main


def _axolotl() -> Callable[[], object]:
    for name in ("axolotl.train", "axolotl.core.builders", "axolotl.utils.trainer", "axolotl.common.datasets"):
        import_module(name)
    cli = import_module("axolotl.cli.train")
    return lambda: cli.do_cli("axolotl.yaml")


def _llamafactory() -> Callable[[], object]:
    tuner = import_module("llamafactory.train.tuner")

    def main() -> object:
        sys.argv = ["llamafactory-cli", "llamafactory.yaml"]
        return tuner.run_exp()

    return main


def _swift() -> Callable[[], object]:
    command, pipelines = import_module("swift.cli.main"), import_module("swift.pipelines")
    for name in ("swift.trainers", "swift.tuners", "swift.arguments"):
        import_module(name)
    words = ["swift.yaml"]

    def main() -> object:
        command.parse_yaml_args(words)
        return pipelines.sft_main(words)

    return main


TRAINERS = {"axolotl.yaml": _axolotl, "llamafactory.yaml": _llamafactory, "swift.yaml": _swift}
"""By the file that a folder has; else TRL or the script."""


def trainer_of(folder: Path) -> Callable[[], object]:
    """The trainer's main function, imported."""
    return next((load for file, load in TRAINERS.items() if (folder / file).is_file()), _trl)()


def train(folder: Path, main: Callable[[], object]) -> int:
    """The child's exit code."""
    child = os.fork()
    if child == 0:
        os._exit(_run(folder, main))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(folder: Path, main: Callable[[], object]) -> int:
    (folder / "probe").mkdir(exist_ok=True)
    os.environ["PEFTPLAN_PROBE"] = str(folder / "probe")
    os.chdir(folder)
    log = os.open("output.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        main()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    started = trainer_of(folders[0])
    import_module("torch").set_num_threads(1)
    for place in folders:
        (place / "code").write_text(str(train(place, started)))
