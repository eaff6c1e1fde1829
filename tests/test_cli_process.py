"""The real process, cold, with the real model: what it loads, how it ends, what the built wheel holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRA = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "numpy")
HEAVY = (*EXTRA, "huggingface_hub")
ESTIMATE = ["estimate", "--model", "llama-7b", "--method", "qlora"]

WATCHED = """
import sys
def forbid(event, args):
    if event.startswith("socket."):
        raise SystemExit(f"network: {event} {args}")
sys.addaudithook(forbid)
from peftplan.cli import main
code = main(sys.argv[1:])
print(code, *sorted(sys.modules), file=sys.stderr)
"""


def _loaded(*arguments: str) -> set[str]:
    """The modules of a process that ran one command; it fails where a socket is made."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    code, *modules = done.stderr.split()
    assert code == "0", done.stderr
    return set(modules)


@pytest.mark.parametrize(
    "arguments",
    [
        ESTIMATE,
        [*ESTIMATE, "--json"],
        ["explain", "--model", "llama-7b"],
        ["list", "models"],
        ["list", "methods"],
    ],
    ids=" ".join,
)
def test_no_torch_and_no_network_in_the_process(arguments: list[str]) -> None:
    assert not _loaded(*arguments).intersection(HEAVY)


def test_rich_is_loaded_only_to_draw() -> None:
    assert "rich" not in _loaded(*ESTIMATE, "--json")
    assert "rich" not in _loaded("--help")


def _peftplan(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "peftplan.cli", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


def test_an_estimates_json_given_back_gives_the_same_answer(tmp_path: Path) -> None:
    first = _peftplan(*ESTIMATE, "--gpu", "rtx-4090", "--json")
    path = tmp_path / "answer.json"
    path.write_text(first.stdout)
    second = _peftplan("estimate", "--job", str(path), "--json")
    ours, theirs = json.loads(first.stdout), json.loads(second.stdout)
    assert ours["job"] == theirs["job"]
    assert {k: v for k, v in ours.items() if k != "assumptions"} == {
        k: v for k, v in theirs.items() if k != "assumptions"
    }


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m peftplan.cli list models | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1


def test_a_reader_that_leaves_first_is_quiet() -> None:
    command = [sys.executable, "-m", "peftplan.cli", "list", "models", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_output_survives_a_terminal_without_unicode() -> None:
    done = _peftplan(*ESTIMATE, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.isascii()


def test_shell_completion_knows_options_models_gpus_and_methods() -> None:
    for words, expected in (
        ("peftplan est", "estimate"),
        ("peftplan estimate --mic", "--micro-batch"),
        ("peftplan estimate --model llama-2-7", "llama-2-7b"),
        ("peftplan estimate --gpu a100-8", "a100-80gb"),
        ("peftplan estimate --method qlo", "qlora"),
        ("peftplan estimate --batching pa", "padded"),
        ("peftplan list g", "gpus"),
    ):
        done = _peftplan(_PEFTPLAN_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(len(words.split()) - 1))
        assert expected in done.stdout.split(), (words, done)


DATA = {
    "peftplan/py.typed",
    "peftplan/arch/models.jsonl",
    "peftplan/hardware/gpus.jsonl",
    "peftplan/hardware/prices.jsonl",
}


@pytest.mark.slow
def test_the_built_wheel_installs_without_torch_and_answers(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(wheel).namelist()) >= DATA
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run(
        [scripts / "python", "-m", "pip", "install", "-q", *constraints, wheel],
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [scripts / "peftplan", *ESTIMATE, "--json"], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert json.loads(done.stdout)["memory"]["peak_bytes"] > 3 * 2**30
    listed = subprocess.run([scripts / "python", "-m", "pip", "freeze"], check=True, capture_output=True, text=True)
    assert not {line.partition("==")[0] for line in listed.stdout.split()}.intersection(EXTRA)
