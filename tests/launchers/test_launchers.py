"""Every launcher: what it writes parses, asks for the right machines, and tells every node the right things."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftplan import export, launchers
from peftplan.errors import RequestError, Unsupported
from peftplan.hardware.gpus import gpus
from peftplan.job import Job
from peftplan.launchers import Place
from peftplan.launchers.base import EXAMPLES
from peftplan.launchers.skypilot import GPUS
from peftplan.trainers.base import TORCHRUN
from tests.launchers.play import TELL, folder, start, tool, write

SHAPES = (*EXAMPLES, (4, 3))
CLUSTERS = ("kubernetes", "local", "ray", "skypilot", "slurm")
SBATCH = {
    "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "output", "time", "partition", "account",
}  # fmt: skip
"""Of the options in sbatch's manual page, slurm.schedmd.com/sbatch.html, 25.05 (2026-11)."""


def job(shape: tuple[int, int]) -> Job:
    return Job(model="llama-7b", gpus=shape[0], nodes=shape[1], gpu="h100")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", launchers.names())
def test_the_trainers_files_stay_and_scripts_parse(name: str, shape: tuple[int, int]) -> None:
    made = launchers.get(name).launch(folder(program="train.py"), job(shape))
    assert made.files["config.yaml"] == "model: m\n"
    for file, text in made.files.items():
        if file.endswith((".sh", ".sbatch")):
            assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
        elif file.endswith(".py"):
            ast.parse(text)
        else:
            assert list(yaml.safe_load_all(text))


@pytest.mark.parametrize("name", launchers.names())
def test_a_launcher_says_what_it_is(name: str) -> None:
    launcher = launchers.get(name)
    assert launcher.name == name
    assert launcher.homepage.startswith("https://")
    assert launcher.title
    assert launcher.checked


def test_one_gpu_here_is_the_trainers_own_command() -> None:
    plain = folder("trl sft --config sft.yaml")
    assert launchers.get("local").launch(plain, job((1, 1))) == plain


def told(shape: tuple[int, int], rank: int, at: str) -> str:
    return f"nodes={shape[1]} rank={rank} processes={shape[0]} at={at}"


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_local_nodes_are_told_by_hand(shape: tuple[int, int], tmp_path: Path) -> None:
    made = launchers.get("local").launch(folder(), job(shape))
    write(made, tmp_path)
    for rank in range(shape[1]):
        by_hand = {} if shape[1] == 1 else {"NODE_RANK": str(rank), "MASTER_ADDR": "first"}
        at = "127.0.0.1:29500" if shape[1] == 1 else "first:29500"
        assert start(made.command, tmp_path, by_hand) == told(shape, rank, at)


def test_a_node_that_is_told_nothing_says_so(tmp_path: Path) -> None:
    made = launchers.get("local").launch(folder(), job((8, 2)))
    write(made, tmp_path)
    done = subprocess.run(["bash", "launch.sh"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "set NODE_RANK to 0..1" in done.stderr


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_slurm_nodes_learn_who_is_first(shape: tuple[int, int], tmp_path: Path) -> None:
    made = launchers.get("slurm").launch(folder(), job(shape))
    write(made, tmp_path)
    tool(tmp_path, "scontrol", 'echo "first"; echo "second"')
    ranks = " ".join(map(str, range(shape[1])))
    tool(tmp_path, "srun", f'for i in {ranks}; do SLURM_NODEID=$i "${{@:3}}" || exit 1; done')
    slurm = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_PER_TASK": "64",
    }
    heard = start("bash job.sbatch", tmp_path, slurm).splitlines()
    assert heard == [told(shape, rank, "first:24242") for rank in range(shape[1])]
    assert made.command == "sbatch job.sbatch"


@pytest.mark.parametrize("shape", SHAPES)
def test_slurm_asks_for_the_machines(shape: tuple[int, int]) -> None:
    place = Place(name="run-7", hours=12, partition="gpu", account="lab")
    text = launchers.get("slurm").launch(folder(), job(shape), place).files["job.sbatch"]
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    options = dict(line.removeprefix("#SBATCH --").split("=", 1) for line in lines)
    assert options.keys() <= SBATCH
    assert options["nodes"] == str(shape[1])
    assert options["gpus-per-node"] == str(shape[0])
    assert options["ntasks-per-node"] == "1"
    assert (options["time"], options["partition"], options["account"]) == ("12:00:00", "gpu", "lab")
    assert text.index("#SBATCH --account") < text.index("set -euo")


@pytest.mark.parametrize("shape", SHAPES)
def test_skypilot_rents_the_machines_and_tells_them(shape: tuple[int, int], tmp_path: Path) -> None:
    made = launchers.get("skypilot").launch(folder(), job(shape))
    data = yaml.safe_load(made.files["task.sky.yaml"])
    assert data["num_nodes"] == shape[1]
    assert data["resources"]["accelerators"] == f"H100:{shape[0]}"
    for rank in range(shape[1]) if shape != (1, 1) else ():
        sky = {
            "SKYPILOT_NUM_NODES": str(shape[1]),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_GPUS_PER_NODE": str(shape[0]),
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
        }
        assert start(data["run"], tmp_path, sky) == told(shape, rank, "10.0.0.1:29500")


def test_skypilot_needs_a_gpu_it_rents() -> None:
    sky = launchers.get("skypilot")
    with pytest.raises(Unsupported, match="pass --gpu"):
        sky.launch(folder(), Job(model="llama-7b"))
    with pytest.raises(Unsupported, match="does not rent Apple M1"):
        sky.launch(folder(), Job(model="llama-7b", gpu="m1"))


def test_skypilots_names_are_of_cards_in_the_catalog() -> None:
    assert set(GPUS) <= {gpu.name for gpu in gpus()}


def pod(replica: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = replica["template"]["spec"]
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_kubernetes_has_one_pod_for_each_node(shape: tuple[int, int], tmp_path: Path) -> None:
    made = launchers.get("kubernetes").launch(folder(files={"a/b.json": "{}", "requirements.txt": "x"}), job(shape))
    config, manifest = yaml.safe_load_all(made.files["job.k8s.yaml"])
    assert config["data"] == {"a__b.json": "{}", "requirements.txt": "x"}
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert sum(replica["replicas"] for replica in replicas.values()) == shape[1]
    assert manifest["spec"]["nprocPerNode"] == str(shape[0])
    for replica in replicas.values():
        (container,) = pod(replica)["containers"]
        assert container["name"] == "pytorch"  # the operator looks for this name
        assert container["resources"]["limits"]["nvidia.com/gpu"] == str(shape[0])
        items = pod(replica)["volumes"][0]["configMap"]["items"]
        assert {"key": "a__b.json", "path": "a/b.json"} in items
    if shape != (1, 1):
        script = pod(replicas["Master"])["containers"][0]["command"][2]
        script = script.replace("/config", str(tmp_path / "config")).replace("/work", str(tmp_path / "work"))
        (tmp_path / "config").mkdir()
        (tmp_path / "work").mkdir()
        tool(tmp_path, "pip", "true")
        for rank in range(shape[1]):
            operator = {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "m-0", "MASTER_PORT": "23456"}
            assert start(script, tmp_path, operator) == told(shape, rank, "m-0:23456")
            assert start(script.replace(TELL, "env"), tmp_path, operator).find("WORLD_SIZE") == -1


def test_kubernetes_refuses_what_a_config_map_does_not_hold() -> None:
    big = folder(files={"data.jsonl": "x" * 2**20})
    with pytest.raises(Unsupported, match="ConfigMap holds 1 MiB"):
        launchers.get("kubernetes").launch(big, job((1, 1)))


def test_ray_takes_whole_nodes() -> None:
    text = launchers.get("ray").launch(folder(), job((4, 3))).files["start_ray.py"]
    assert "NODES, GPUS, CPUS_PER_GPU = 3, 4, 8" in text
    assert f"COMMAND = {TELL!r}" in text


@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_processes_of_a_trainer_that_starts_its_own_are_not_started(name: str) -> None:
    with pytest.raises(Unsupported, match="starts its own processes; use --launcher local"):
        launchers.get(name).launch(folder(), job((8, 1)))


def test_torchrun_does_not_lose_how_to_shard() -> None:
    sharded = folder(program="train.py", files={"accelerate.yaml": "distributed_type: FSDP\n"})
    with pytest.raises(Unsupported, match="use --launcher accelerate"):
        launchers.get("torchrun").launch(sharded, job((8, 1)).model_copy(update={"layout": "fsdp"}))
    launchers.get("torchrun").launch(sharded, job((8, 1)).model_copy(update={"layout": "ddp"}))
    made = launchers.get("accelerate").launch(sharded, job((8, 2)))
    assert "accelerate launch --config_file accelerate.yaml --num_processes 16 " in made.files["launch.sh"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_file_of_the_trainers_is_not_overwritten(name: str) -> None:
    launcher = launchers.get(name)
    added = set(launcher.launch(folder(), job((8, 1))).files) - {"config.yaml"}
    for file in added:
        with pytest.raises(RequestError, match="which the trainer writes too"):
            launcher.launch(folder(files={file: ""}), job((8, 1)))


def test_torchruns_flags_name_what_every_node_is_told() -> None:
    made = launchers.get("torchrun").launch(folder(program="-m trl.scripts.sft"), job((8, 2)))
    assert f"{TORCHRUN} -m trl.scripts.sft" in made.files["launch.sh"]


def test_machines_that_are_rented_install_what_the_trainer_needs(tmp_path: Path) -> None:
    for name, said in {
        "skypilot": "pip install -r requirements.txt",
        "kubernetes": "pip install",
        "ray": "pip",
    }.items():
        export(job((1, 1)), trainer="trl", launcher=name, out=tmp_path / name)
        written = launchers.get(name).launch(folder(files={"requirements.txt": ""}), job((1, 1))).files
        (file,) = set(written) - {"requirements.txt"}
        assert said in (tmp_path / name / file).read_text()
        assert "trl==" in (tmp_path / name / "requirements.txt").read_text()
