"""Benchmarks of whole processes: the time to a first step, and all that a GPU is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.errors import ConfigError
from pretrain.distributed import World
from pretrain.engines import check_engine
from tests.tools.small_run import WORLD, prepare_small, small_config
from tools import bench
from tools.benching import gpu, startup
from tools.benching.gpu import Part


def once(names: list[str], turn: Callable[[int, bool], float], rounds: int) -> list[list[float]]:
    """``alternate`` without a round that warms up."""
    return [[turn(place, False)] for place in range(len(names))]


@pytest.mark.drill
def test_startup_waits_for_the_first_step_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(tmp_path, prepare_small(tmp_path))
    config = replace(config, model=replace(config.model, vocab_size=300), train=replace(config.train, steps=100_000))
    own = tmp_path / "own"
    own.mkdir()
    monkeypatch.setattr(startup, "alternate", once)  # each start costs seconds
    table = startup.measure(config, "cpu", ["nanogpt"], own, rounds=1, limit=120)
    assert [row.name for row in table.rows] == [startup.START, startup.RESTART, "nanogpt"]
    assert all(0.1 < row.values[0] < 120 for row in table.rows)
    first = json.loads((own / "fresh" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 1
    again = json.loads((own / "run" / "metrics.jsonl").read_text().splitlines()[0])
    committed = max((own / "run" / "checkpoints").glob("step-*"))
    assert again["step"] == int(committed.name.removeprefix("step-")) + 1


def test_a_process_that_fails_or_hangs_is_one_line(tmp_path: Path) -> None:
    import sys

    sign = tmp_path / "sign"
    with pytest.raises(ConfigError, match="ended before its first step: nothing to do"):
        startup._until([sys.executable, "-c", "import sys; sys.exit('nothing to do')"], sign, 30)
    with pytest.raises(ConfigError, match=r"took no step in 0\.2 s: write a longer --limit"):
        startup._until([sys.executable, "-c", "import time; time.sleep(60)"], sign, 0.2)


def test_a_gpu_is_asked_what_can_be_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part is a command of tools.bench whose configurations load, at real size and at a toy's."""
    asked: list[list[str]] = []
    for option in ("_model", "_profile", "_kernels"):
        monkeypatch.setattr(bench, option, lambda options, overrides: asked.append(overrides))
    for memory, dry in ((141e9, False), (80e9, False), (0.0, True)):
        folder = tmp_path / f"{memory}"
        folder.mkdir()
        parts = gpu.parts(folder, memory, dry)
        assert len({part.name for part in parts}) == len(parts)
        for part in parts:
            bench.main([*part.arguments, "--output", str(folder / part.name)])
    assert not any(asked)  # nothing was taken for an override
    sizes = {}
    for path in sorted((tmp_path / "141000000000.0").glob("*.yaml")):
        config = bench.open_config(path)
        cpu = replace(config, train=replace(config.train, compile=False, cuda_graphs=False))
        sizes[path.stem] = sum(p.numel() for p in check_engine(cpu, WORLD).parameters())
    assert sizes["1.3b"] == 1_345_423_360
    assert sizes["3b"] == 3_367_676_928
    assert sizes["7b-msgdw-bf16-momentum"] == 6_738_415_616
    assert len(sizes) == 9


@pytest.mark.drill
def test_every_part_ends_in_time_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "gpu_memory", lambda: 0.0)
    own = gpu.parts(tmp_path, 0.0, dry=True)
    (profile,) = [part for part in own if part.name == "1.3b-profile"]
    wrong = replace(profile, name="wrong", arguments=("profile", str(tmp_path / "absent.yaml")))
    chosen = [profile, wrong, replace(profile, name="long", seconds=0.5)]
    monkeypatch.setattr(gpu, "parts", lambda *_: chosen)
    monkeypatch.setattr(gpu, "_LEAST", 0.1)
    done = gpu.run(tmp_path, minutes=2, dry=True)
    assert [outcome.state for outcome in done[:1]] == ["done"]
    assert done[1].state.startswith("failed: no configuration file")
    assert done[2].state.startswith("stopped: it took longer than")
    written = json.loads((tmp_path / "results.json").read_text())
    assert [one["part"] for one in written] == ["1.3b-profile", "wrong", "long"]
    assert written[0]["result"]["tables"][0]["title"] == "Where a step's time goes"
    assert written[1]["result"] == {}
    assert "| wrong | failed: no configuration file" in (tmp_path / "table.md").read_text()


def test_no_part_is_begun_without_time(tmp_path: Path) -> None:
    outcome = gpu._outcome(Part("late", ("kernels",), 60), tmp_path, limit=3.0)
    assert (outcome.state, outcome.result) == ("not begun: no time was left", {})


def test_random_tokens_can_be_trained_on(tmp_path: Path) -> None:
    from tools.benching.ours import OurSteps
    from tools.benching.synthetic import random_tokens

    random_tokens(tmp_path / "data", 70_000, 4096)
    config = small_config(tmp_path, tmp_path / "data")
    config = replace(config, model=replace(config.model, vocab_size=70_000, width=8))
    steps = OurSteps(config, World(0, 1, torch.device("cpu")))
    steps.step()
    steps.close()
