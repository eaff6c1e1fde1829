"""What cluster tools themselves make of the files: each in its own environment, without a cluster."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from peftplan import launchers
from peftplan.job import Job
from peftplan.launchers import Place
from tests.e2e import clusters
from tests.e2e.venvs import venv
from tests.launchers.play import folder, write

pytestmark = pytest.mark.trainers
FILES = {"skypilot": "task.sky.yaml", "kubernetes": "job.k8s.yaml"}
PLACES = (Place(), Place(name="run-7", image="registry.example/train:1", hours=12, volume="results"))


def ask(tool: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(venv(tool)), str(clusters.__file__), tool, str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=path.parent)


@pytest.mark.parametrize("place", PLACES, ids=["plain", "named"])
@pytest.mark.parametrize("shape", [(1, 1), (8, 2)], ids=str)
@pytest.mark.parametrize("tool", FILES)
def test_its_own_schema_accepts_what_is_written(
    tool: str, shape: tuple[int, int], place: Place, tmp_path: Path
) -> None:
    job = Job(model="llama-7b", gpus=shape[0], nodes=shape[1], gpu="h100")
    made = launchers.get(tool).launch(folder(files={"requirements.txt": "trl\n", "a/b.json": "{}\n"}), job, place)
    path = write(made, tmp_path) / FILES[tool]
    done = ask(tool, path)
    assert done.returncode == 0, done.stderr[-2000:]
    wrong = path.read_text().replace("num_nodes:", "num_nodse:").replace("volumeMounts:", "volumeMuonts:")
    path.write_text(wrong)
    assert ask(tool, path).returncode != 0


def test_ray_runs_the_command_once_on_every_node(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    wanted = "^(NNODES|NODE_RANK|NPROC|RANK|WORLD|LOCAL)"
    tell = f'{{ cat config.yaml; env | grep -E "{wanted}"; }} > {seen}/$NODE_RANK'
    made = launchers.get("ray").launch(folder(tell), Job(model="llama-7b", gpus=2, nodes=2))
    (tmp_path / "run").mkdir()
    done = ask("ray", write(made, tmp_path / "run") / "start_ray.py")
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        told = sorted((seen / str(rank)).read_text().splitlines())
        assert told == ["NNODES=2", f"NODE_RANK={rank}", "NPROC_PER_NODE=2", "model: m"]
