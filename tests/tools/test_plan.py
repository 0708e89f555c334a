"""The command: what it prints, its exit codes, and mistakes in what it is given."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from models import ConfigError
from tests.grids import surveyed
from tests.runs import ONE_THREAD, REPOSITORY
from tools.plan import main

CONFIGS = REPOSITORY / "configs" / "models"
TEST = str(CONFIGS / "test-llama.yaml")
VOCABULARY = ["--model.vocab_size", "512"]
PLANNED = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_json_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    code, plan = planned(capsys, TEST, *VOCABULARY, "--gpus-per-node", "4", "--data.path", "no/such/folder")
    memory = plan["memory"]
    terms = sum(size for name, size in memory.items() if name not in ("total", "of"))
    assert memory["total"] == pytest.approx(terms)
    assert (code, plan["fits"], plan["remedy"]) == (0, True, None)
    assert plan["largest_micro_batch"] == 4  # 1024 tokens are 16 sequences of 64, on 4 ranks
    assert plan["counts"]["batch_tokens"] == 1024
    pace = plan["pace"]
    steps = plan["counts"]["steps"]
    assert pace["tokens_per_second"] * pace["days"] * 86_400 == pytest.approx(steps * 1024)


def test_what_does_not_fit_says_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        str(CONFIGS / "llama-7b.yaml"),
        "--gpu",
        "a100-40gb",
        "--gpus-per-node",
        "8",
        "--train.compile",
        "false",
        "--train.kernels",
        "torch",
    ]
    code, plan = planned(capsys, *arguments)
    assert (code, plan["fits"], plan["largest_micro_batch"]) == (1, False, None)
    changes = " ".join(change["write"] for change in plan["remedy"]["changes"]).split()
    assert planned(capsys, *arguments, *changes)[0] == 0
    assert main(arguments) == 1
    text = capsys.readouterr().out
    assert "does not fit: " in text
    assert "fits with " + " ".join(changes) in text
    assert f"{plan['memory']['total'] / 1e9:.3f}" in text


def test_given_bandwidths_and_mfu_are_used(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [TEST, *VOCABULARY, "--nodes", "2", "--gpus-per-node", "2", "--train.micro_batch", "1"]
    _, slow = planned(capsys, *arguments, "--inter-node-gb-s", "1", "--intra-node-gb-s", "2", "--mfu", "0.2")
    _, fast = planned(capsys, *arguments, "--inter-node-gb-s", "2", "--intra-node-gb-s", "4", "--mfu", "0.4")
    for one, two in zip(slow["traffic"], fast["traffic"], strict=True):
        assert one["seconds"] == max(one["intra_node"] / 2e9, one["inter_node"] / 1e9) == 2 * two["seconds"] > 0
    assert slow["pace"]["compute"] == pytest.approx(2 * fast["pace"]["compute"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TEST, "--gpu", "h100"], "--gpu: no GPU is called 'h100'; did you mean"),
        ([TEST, "--gpu", "h100-80g"], "did you mean 'h100-80gb'"),
        ([TEST], "write --model.vocab_size"),
        ([TEST, *VOCABULARY, "--nodes", "0"], "--nodes is 0: write a positive number"),
        ([TEST, *VOCABULARY, "--nodes", "two"], "--nodes: invalid int value: 'two'"),
        ([TEST, *VOCABULARY, "--mfu", "40"], "--mfu is 40: write a share"),
        ([TEST, *VOCABULARY, "--gpu", "l4", "--nodes", "2"], "--inter-node-gb-s is missing"),
        ([TEST, *VOCABULARY, "--inter-node-gb-s", "-1"], "write a positive number"),
        ([TEST, *VOCABULARY, "--modle.width", "64"], "did you mean 'model.width'"),
        ([TEST, *VOCABULARY, "--gpus-per-node", "3"], "train.batch_tokens 1024 is not a multiple"),
        (["no.yaml"], "no configuration file no.yaml"),
        ([], "required: CONFIG.yaml"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        main(arguments)
    assert message in str(told.value)
    assert "\n" not in str(told.value)


def test_a_mistake_is_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tools.plan", TEST, "--gpu", "b20"],
        cwd=REPOSITORY,
        env=ONE_THREAD,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == ["error: --gpu: no GPU is called 'b20'; did you mean 'b200'?"]


@pytest.mark.drill
@pytest.mark.parametrize("name", surveyed(PLANNED, ("gpt-1436m.yaml", "llama-7b.yaml", "test-llama.yaml")))
def test_every_model_is_planned_within_a_minute(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """LLaMA on 8 x 8 H100s, the others, whose batches have no 64 equal parts, on 8."""
    began = time.process_time()
    cluster = ["--nodes", "8" if name.startswith("llama") else "1", "--gpus-per-node", "8"]
    code, plan = planned(capsys, str(CONFIGS / name), *VOCABULARY * name.startswith("test"), *cluster)
    assert time.process_time() - began < 60
    assert code == 0
    assert plan["name"] == Path(name).stem
