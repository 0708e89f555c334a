"""metrics.jsonl stays the file of an uninterrupted run, whatever interrupts it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.telemetry import MetricsWriter


def log(folder: Path, resume_step: int, until: int) -> None:
    """A run that logs every step and validates at every third, up to and with step ``until``."""
    writer = MetricsWriter(folder, tensorboard=False, resume_step=resume_step)
    if resume_step == 0:
        writer.write(0, {"val_loss": 9.0})
    for step in range(resume_step + 1, until + 1):
        writer.write(step, {"tokens": 100 * step, "loss": 1.0 / step})
        if step % 3 == 0:
            writer.write(step, {"val_loss": 2.0 / step})
    writer.close()


@given(interruptions=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5), st.integers(0, 40)), max_size=4))
def test_interrupted_is_uninterrupted(
    interruptions: list[tuple[int, int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole, broken = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("broken")
    log(whole, 0, 12)
    file = broken / "metrics.jsonl"
    checkpoint = 0
    for further, behind, torn in interruptions:
        reached = min(checkpoint + further, 12)
        log(broken, checkpoint, reached)
        checkpoint = max(checkpoint, reached - behind)
        with file.open("ab") as tail:  # a line that a kill cut off after ``torn`` bytes
            tail.write(json.dumps({"step": reached + 1, "loss": 0.5}).encode()[:torn])
    log(broken, checkpoint, 12)
    assert file.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert [path.name for path in broken.iterdir()] == ["metrics.jsonl"]  # no temporary left


def test_a_torn_line_that_is_whole_json_goes_too(tmp_path: Path) -> None:
    """Without its newline the next line would be appended to it."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    MetricsWriter(tmp_path, tensorboard=False, resume_step=5).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_lines_are_readable_json_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=0)
    values = {"loss": float("nan"), "lr": float("-inf"), "mfu": None, "batch_hash": "00ff", "grad_norm": 1.5}
    writer.write(3, values)
    line = (tmp_path / "metrics.jsonl").read_text()  # before close
    writer.close()

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    expected = {"step": 3, "loss": None, "lr": None, "mfu": None, "batch_hash": "00ff", "grad_norm": 1.5}
    assert json.loads(line, parse_constant=no_constant) == expected
    assert line.count("\n") == 1


@pytest.mark.parametrize("bad", ["{broken\n", '{"loss": 1}\n', "[1]\n", '{"step": null}\n'])
def test_a_damaged_middle_is_refused_and_left_as_it_is(tmp_path: Path, bad: str) -> None:
    text = '{"step": 1}\n' + bad + '{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl line 2"):
        MetricsWriter(tmp_path, tensorboard=False, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_tensorboard_shows_the_uninterrupted_run(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = MetricsWriter(tmp_path, tensorboard=True, resume_step=0)
    for step in range(1, 6):
        first.write(step, {"loss": float(step), "batch_hash": "00ff", "mfu": None})
    first.close()
    second = MetricsWriter(tmp_path, tensorboard=True, resume_step=3)
    for step in range(4, 7):
        second.write(step, {"loss": 10.0 * step})
    second.close()
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 40.0),
        (5, 50.0),
        (6, 60.0),
    ]


def test_missing_tensorboard_is_a_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it now fails
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        MetricsWriter(tmp_path, tensorboard=True, resume_step=0)
    MetricsWriter(tmp_path, tensorboard=False, resume_step=0).close()
