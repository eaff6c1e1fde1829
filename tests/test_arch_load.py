"""How a model is found: explicit config, path, catalog name; and every way a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from peftplan.arch import load_arch
from peftplan.arch.files import LARGEST_BYTES
from peftplan.errors import BadFile, PeftplanError, RequestError, Unsupported

TINY = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 97,
    "dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_a_folder_and_its_file_read_alike(folder: Path) -> None:
    by_folder, by_file = load_arch(str(folder)), load_arch(str(folder / "config.json"))
    assert by_folder.layers == by_file.layers
    assert by_folder.model_dump() == TINY
    assert by_folder.name == str(folder)


def test_a_byte_order_mark_is_no_obstacle(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TINY).encode())
    assert load_arch(str(folder)).hidden == 48


def test_a_home_folder_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_arch(f"~/{folder.name}").hidden == 48


def test_the_config_wins_over_the_name(folder: Path) -> None:
    assert load_arch(str(folder), config={**TINY, "hidden_size": 96}).hidden == 96
    assert load_arch("llama-7b", config=TINY).hidden == 48


def test_a_folder_with_a_config_wins_over_the_catalog(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "gpt2").mkdir()
    (folder / "llama-7b").mkdir()
    assert load_arch("llama-7b").hidden == 4096
    (folder / "llama-7b" / "config.json").write_text(json.dumps(TINY))
    assert load_arch("llama-7b").hidden == 48


def test_a_relative_folder_that_reads_like_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "models" / "mine" / "config.json").write_text(json.dumps(TINY))
    assert load_arch("models/mine").hidden == 48


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b"null", "holds a JSON NoneType, not an object"),
        (b'"llama"', "holds a JSON str, not an object"),
        (b'{"hidden_size": NaN}', "NaN is not a JSON number"),
        (b'{"hidden_size": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"hidden_size": 1' + b"0" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"\x80\x04\x95pickle", "not a UTF-8 text file"),
        (b"import os; os.system('echo run')", "not valid JSON"),
        (b"{}", "model_type is missing; use one of deepseek_v3, gemma, granite, llama"),
        (b'{"model_type": 3}', "model_type must be a string, not 3"),
        (b'{"peft_type": "LORA"}', "a PEFT adapter's config"),
        (b'{"model_type": "evil\\nname"}', "model_type 'evil\\nname' is not modelled"),
        (json.dumps({**TINY, "num_hidden_layers": -1}).encode(), "num_hidden_layers must be a positive"),
    ],
)
def test_a_bad_file_is_one_line_naming_it(tmp_path: Path, text: bytes, line: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(RequestError) as caught:
        load_arch(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(200 * 10**6)
    with pytest.raises(BadFile, match="larger than 16 MB"):
        load_arch(str(path))
    path.write_text(json.dumps({**TINY, "padding": "x" * (LARGEST_BYTES - 1000)}))
    assert load_arch(str(path)).hidden == 48


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("missing.json", "no such file or folder"),
        ("./missing", "no such file or folder"),
        ("/missing/folder", "no such file or folder"),
        ("~nobody-of-this-name/model", "no such file or folder"),
        ("empty/", "the folder has no config.json"),
        ("./empty", "the folder has no config.json"),
        ("adapter", "holds a PEFT adapter but no config.json; give its base model"),
        ("odd.json", "not a file"),
        ("/dev/zero", "not a file"),
        ("", "no model given"),
        ("  ", "no model given"),
        ("a\nb", "is not the name of a model"),
        ("x\0y", "is not the name of a model"),
        ("x" * 5000, "is not the name of a model"),
        ("x" * 900 + ".json", "cannot be read"),
        ("model.gguf", "a weights file is not read"),
        ("some/model.safetensors", "a weights file is not read"),
        ("pytorch_model.bin", "a weights file is not read"),
    ],
)
def test_a_bad_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").mkdir()
    (tmp_path / "odd.json" / "config.json").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(PeftplanError) as caught:
        load_arch(name)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_weights_file_is_well_formed_but_unsupported() -> None:
    with pytest.raises(Unsupported):
        load_arch("model.gguf")


def test_a_config_must_be_an_object() -> None:
    with pytest.raises(RequestError, match="must be an object"):
        load_arch("tiny", config=[1])  # type: ignore[arg-type]


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")

    def refuse(*_args: object, **_kwargs: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BadFile, match=r"cannot be read \(Permission denied\)"):
        load_arch(str(tmp_path))


def test_loading_from_the_catalog_imports_no_network_and_no_torch() -> None:
    code = (
        "import sys; from peftplan.arch import load_arch; load_arch('llama-3.1-8b'); "
        "print([name for name in ('torch', 'transformers', 'huggingface_hub', 'socket', 'ssl', 'pydantic') "
        "if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
