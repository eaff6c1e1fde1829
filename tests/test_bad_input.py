"""Bad input through the command line: exit code 2 and one line that names the offender and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftplan.cli import main

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 88,
    "vocab_size": 97,
}
HUGE = 200 * 1024 * 1024


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that `peftplan estimate` refuses with."""
    code = main(["estimate", *arguments])
    printed = capsys.readouterr()
    assert code == 2, (code, printed)
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("error: ")
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "offender", "fix"),
    [
        # missing or contradictory
        ("", "--model", "missing"),
        ("--model llama-7b --method full --format nf4", "full", "such as lora"),
        ("--model llama-7b --method freeze --format int8", "freeze", "such as lora"),
        ("--model llama-7b --precision fp32-mixed", "fp32-mixed", "use bf16-mixed"),
        ("--model llama-7b --attention fa2 --dtype fp32", "flash_attention_2", "use --attention sdpa"),
        ("--model llama-7b --method freeze --set method.layers=0", "freeze", "set method.layers"),
        ("--model llama-7b --method freeze --set method.layers=33", "method.layers=33", "use 0 to 32"),
        ("--model phi-3-mini --method lora", "phi3", "pass --target-modules"),
        # sizes
        ("--model llama-7b --micro-batch 0", "--micro-batch", "1 or more"),
        ("--model llama-7b --micro-batch -3", "--micro-batch", "1 or more"),
        ("--model llama-7b --seq-len 0", "--seq-len", "1 or more"),
        ("--model llama-7b --seq-len -17", "--seq-len", "1 or more"),
        ("--model llama-7b --grad-accum 0", "--grad-accum", "1 or more"),
        ("--model llama-7b --rank 0", "--rank", "1 or more"),
        ("--model llama-7b --rank -8", "--rank", "1 or more"),
        ("--model llama-7b --tokens 0", "--tokens", "1 or more"),
        ("--model llama-7b --usd-per-hour -1", "--usd-per-hour", "0 or more"),
        ("--model llama-7b --micro-batch 1.5", "--micro-batch", "whole number"),
        ("--model llama-7b --micro-batch many", "--micro-batch", "whole number"),
        ("--model llama-7b --micro-batch true", "--micro-batch", "whole number"),
        ("--model llama-7b --seq-len nan", "--seq-len", "whole number"),
        ("--model llama-7b --usd-per-hour nan", "--usd-per-hour", "give a number"),
        ("--model llama-7b --usd-per-hour inf", "--usd-per-hour", "number"),
        (f"--model llama-7b --micro-batch {10**30}", "--micro-batch", "at most"),
        (f"--model llama-7b --seq-len {10**400}", "--seq-len", "at most"),
        (f"--model llama-7b --rank {10**30}", "--rank", ""),
        # names
        ("--model lama-7b", "lama-7b", "llama-7b"),
        ("--model nothing-like-it-at-all", "nothing-like-it-at-all", ""),
        ("--model llama-7b --method lroa", "lroa", "did you mean lora"),
        ("--model llama-7b --format nf5", "nf5", "did you mean nf4"),
        ("--model llama-7b --optimizer adamv", "adamv", "did you mean adamw"),
        ("--model llama-7b --gpu rtx-4091", "rtx-4091", "did you mean"),
        ("--model llama-7b --dtype bf17", "bf17", "bf16"),
        ("--model llama-7b --dtype int8", "int8", "use bf16, fp16 or fp32"),
        ("--model llama-7b --adapter-dtype f32x", "f32x", ""),
        ("--model llama-7b --precision bf17", "bf17", "use bf16, fp16"),
        ("--model llama-7b --attention sdap", "sdap", "did you mean sdpa"),
        ("--model llama-7b --recompute ful", "ful", "did you mean full"),
        ("--model llama-7b --batching pading", "--batching", "'padded'"),
        ("--model llama-7b --backend tpu", "--backend", "'cuda'"),
        ("--modle llama-7b", "--modle", "did you mean --model"),
        # targets and ranks
        ("--model llama-7b --rank 5000", "rank 5000", "use at most 4096"),
        ("--model llama-7b --target-modules q_porj", "q_porj", "this model has"),
        ("--model llama-7b --target-modules .*(", ".*(", "regular expression"),
        ("--model llama-7b --set method.modules_to_save=[heads]", "heads", "this model has"),
        # settings
        ("--model llama-7b --set method.lora_droput=0.1", "lora_droput", "did you mean lora_dropout"),
        ("--model llama-7b --set metod.r=1", "metod", "did you mean method"),
        ("--model llama-7b --set method.lora_dropout=1", "lora_dropout=1", "below 1"),
        ("--model llama-7b --set method.lora_dropout=nan", "lora_dropout", "below 1"),
        ("--model llama-7b --set method.lora_dropout=high", "lora_dropout='high'", "number"),
        ("--model llama-7b --set method.r=true", "r=True", "give int"),
        ("--model llama-7b --set method.bias=some", "bias='some'", "'all'"),
        ("--model llama-7b --format nf4 --set format.blocksize=48", "format.blocksize=48", "use one of"),
        ("--model llama-7b --format nf4 --set format.blocksize=0", "format.blocksize=0", "use one of"),
        ("--model llama-7b --format nf4 --set format.compute_dtype=bf61", "bf61", ""),
        ("--model llama-7b --set optimizer.impl=fast", "impl='fast'", "'fused'"),
        ("--model llama-7b --set recompute.reentrant=true", "reentrant", "did you mean use_reentrant"),
        ("--model llama-7b --set loop.outputs_until=nxt", "nxt", "did you mean next"),
        ("--model llama-7b --set model.hidden_size=0", "hidden_size", ""),
        ("--model llama-7b --set model.hidden_size=-1", "hidden_size", ""),
        ("--model llama-7b --set model.num_attention_heads=7", "heads", ""),
        ("--model llama-7b --set method.r", "method.r", "write it like"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
def test_one_line_names_the_offender_and_the_fix(
    capsys: pytest.CaptureFixture[str], arguments: str, offender: str, fix: str
) -> None:
    line = refused(capsys, *arguments.split())
    assert offender in line
    assert fix in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}, "model_type": "mine"}, "mine"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "lama"}, "lama"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -48}, "hidden_size"),
        ({"hidden_size": "48; import os"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"hidden_size": float("nan")}, "NaN is not a JSON number"),
        ({"hidden_size": 10**40}, "hidden_size"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"vocab_size": None}, "vocab_size"),
        ({"torch_dtype": "__import__('os')"}, "dtype"),
    ],
    ids=str,
)
def test_a_bad_config_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    assert says in refused(capsys, "--model", str(path))


def test_code_beside_a_config_is_not_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A config of a known family that points at code: the family's own rules are used, the code is left alone."""
    ran = tmp_path / "ran"
    (tmp_path / "modeling.py").write_text(f"open({str(ran)!r}, 'w')")
    auto_map = {"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "auto_map": auto_map}))
    main(["estimate", "--model", str(tmp_path)])
    capsys.readouterr()
    assert not ran.exists()


def test_huge_sizes_are_answered(capsys: pytest.CaptureFixture[str]) -> None:
    most = ["--micro-batch", str(10**9), "--seq-len", str(10**9), "--attention", "eager"]
    assert main(["estimate", "--model", "llama-7b", *most]) == 0
    assert "more than any" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["micro_batch", "seq_len", "rank", "usd_per_hour", "tokens"])
def test_a_truth_value_is_no_number(capsys: pytest.CaptureFixture[str], tmp_path: Path, field: str) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({"model": "llama-7b", field: True}))
    assert "should not be true or false" in refused(capsys, "--job", str(path))


def test_a_huge_config_is_not_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(HUGE)  # sparse: takes no space
    assert "larger than 16 M" in refused(capsys, "--model", str(path))
    assert "larger than 16 M" in refused(capsys, "--model", str(tmp_path))
    assert "larger than 16 M" in refused(capsys, "--job", str(path))


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\x00\x01", '{"model_type": ' + "[" * 50_000])
def test_a_config_that_is_none_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    assert "config.json" in refused(capsys, "--model", str(path))
