"""Whether a job starts again: the whole table, and what must never be, whatever else holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.decide import decide, failures, main
from launch.launches import Launch, launches_of

FINISHED = {"code": 0, "text": "finished: step 20", "step": 20, "reason": "no"}
MISTAKE = {"code": 2, "text": "no data"}
DIVERGED = {"code": 3, "text": "the loss is nan", "step": 7, "reason": "no"}
SIGNALLED = {"code": 75, "text": "stopped: step 7", "step": 7, "reason": "signal"}
BY_HAND = {"code": 75, "text": "stopped: step 7", "step": 7, "reason": "file"}
INTERRUPTED = {"code": 130, "text": "interrupted"}
OUTCOMES = [None, FINISHED, MISTAKE, DIVERGED, SIGNALLED, BY_HAND, INTERRUPTED]


@pytest.mark.parametrize(
    ("outcome", "terminated", "requeues", "failed", "requeue", "code", "why"),
    [
        (FINISHED, False, 0, 0, False, 0, "finished"),
        (FINISHED, True, 5, 9, False, 0, "finished"),
        (MISTAKE, False, 0, 0, False, 2, "no data; starting again would not mend that"),
        (DIVERGED, False, 0, 0, False, 3, "the loss is nan; starting again would not mend that"),
        (INTERRUPTED, False, 0, 0, False, 130, "interrupted"),
        (SIGNALLED, False, 0, 0, True, 0, "requeue 1 of at most 5"),
        (SIGNALLED, False, 4, 0, True, 0, "requeue 5 of at most 5"),
        (SIGNALLED, False, 5, 0, False, 75, "requeued 5 times, which is the cap"),
        (SIGNALLED, True, 0, 0, False, 75, "the job was told to end"),
        (SIGNALLED, False, 0, 9, True, 0, "requeue 1 of at most 5"),  # its failures are before it
        (BY_HAND, False, 0, 0, False, 75, "as asked; submit it again to go on"),
        (None, False, 0, 1, True, 0, "without a word: killed, or crashed; requeue 1 of at most 5"),
        (None, False, 0, 2, True, 0, "requeue 1 of at most 5"),
        (None, False, 0, 3, False, 1, "so did 3 launches in a row"),
        (None, False, 5, 1, False, 1, "requeued 5 times, which is the cap"),
        (None, True, 0, 1, False, 1, "the job was told to end"),
    ],
)
def test_the_table(
    outcome: dict[str, Any] | None,
    terminated: bool,
    requeues: int,
    failed: int,
    requeue: bool,
    code: int,
    why: str,
) -> None:
    found = decide(outcome, terminated=terminated, requeues=requeues, max_requeues=5, failures=failed, max_failures=3)
    assert (found.requeue, found.code) == (requeue, code)
    assert why in found.why
    assert "\n" not in found.why


@given(
    st.one_of(st.sampled_from(OUTCOMES), st.fixed_dictionaries({"code": st.integers(0, 255), "text": st.text()})),
    st.booleans(),
    *[st.integers(0, 6)] * 4,
)
def test_what_must_never_be(
    outcome: dict[str, Any] | None, terminated: bool, requeues: int, cap: int, failed: int, most: int
) -> None:
    found = decide(
        outcome, terminated=terminated, requeues=requeues, max_requeues=cap, failures=failed, max_failures=most
    )
    code = None if outcome is None else outcome["code"]
    if code not in (None, 75):
        assert not found.requeue, "finished, a mistake, diverged: each time the same"
        assert found.code == code
    if terminated or requeues >= cap or (outcome is not None and outcome.get("reason") != "signal"):
        assert not found.requeue
    if outcome is None and failed >= most:
        assert not found.requeue, "it crashes for ever"
    if found.requeue:
        assert found.code == 0
    else:
        assert (found.code == 0) == (code == 0), "SLURM calls a job COMPLETED for exit code 0 alone"


def launch(run: Path, restart: int, step: int, outcome: dict[str, Any] | None, job: str | None = "7") -> Launch:
    """One that is written down; they began in the order of their numbers."""
    one = Launch(str(run), ["c.yaml"], "code", 1000.0 + restart, step, ["n1"], job, restart)
    one.create()
    if outcome is not None:
        (one.folder / "outcome.json").write_text(json.dumps(outcome))
    return one


def test_launches_that_fail_in_a_row_are_counted(tmp_path: Path) -> None:
    def count(step: int) -> int:
        every = launches_of(tmp_path)
        return failures(every[-1], every, step)

    launch(tmp_path, 0, 0, None)
    assert count(0) == 1
    assert count(5) == 0, "it committed something"
    launch(tmp_path, 1, 5, None)
    assert (count(5), count(9)) == (1, 0), "the one before got to step 5"
    launch(tmp_path, 2, 5, None)
    assert count(5) == 2
    launch(tmp_path, 3, 5, SIGNALLED)
    assert count(5) == 0, "one that ends by its own word is no failure"
    launch(tmp_path, 4, 5, None)
    launch(tmp_path, 5, 5, None)
    launch(tmp_path, 6, 5, None, job="8")
    assert count(5) == 1, "another job's are not this one's"
    launch(tmp_path, 7, 5, None)
    assert count(5) == 3, "nor do they come between"
    every = launches_of(tmp_path)
    assert failures(every[5], every, 5) == 2, "what came after does not count"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_failures_are_those_since_the_last_progress_or_word(history: list[tuple[bool, bool]]) -> None:
    """Each launch: whether it commits something, whether it ends with a word."""
    every, step, expected = [], 0, 0
    for i, (commits, speaks) in enumerate(history):
        every.append(Launch("run", [], "code", float(i), step, [], "7", i))
        step += commits
        expected = 0 if commits or speaks else expected + 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Launch, "outcome", property(lambda one: SIGNALLED if history[one.restart][1] else None))
        assert failures(every[-1], every, step) == expected


@pytest.mark.parametrize(
    ("outcome", "options", "printed"),
    [
        (SIGNALLED, [], "requeue"),
        (SIGNALLED, ["--terminated"], "end 75"),
        (SIGNALLED, ["--max-requeues", "2"], "end 75"),
        (None, [], "end 1"),
        (None, ["--max-failures", "3"], "end 1"),
        (None, ["--max-failures", "4"], "requeue"),
        (FINISHED, [], "end 0"),
    ],
)
def test_what_the_batch_script_reads(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    outcome: dict[str, Any] | None,
    options: list[str],
    printed: str,
) -> None:
    for i in range(2):
        launch(tmp_path, i, 0, None)
    last = launch(tmp_path, 2, 0, outcome)
    assert main([str(last.folder), *options]) == 0
    said = capsys.readouterr()
    assert said.out == printed + "\n"
    assert said.err.startswith("launch: ")
    assert said.err.count("\n") == 1


def test_a_committed_checkpoint_is_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = launch(tmp_path, 0, 0, None)
    assert main([str(last.folder), "--max-failures", "1"]) == 0
    assert capsys.readouterr().out == "end 1\n"
    (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    assert main([str(last.folder), "--max-failures", "1"]) == 0
    assert capsys.readouterr().out == "requeue\n"


def test_what_the_health_check_found_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It counts as a crash: SLURM may give other hosts, but not for ever."""
    last = launch(tmp_path, 0, 0, None)
    findings = [{"text": "a slow disk", "fails": False}, {"text": "n1 has no GPU 3", "fails": True}]
    (last.folder / "health.json").write_text(json.dumps({"findings": findings}))
    assert main([str(last.folder)]) == 0
    said = capsys.readouterr()
    assert said.out == "requeue\n"
    assert said.err.startswith("launch: unhealthy: n1 has no GPU 3; requeue 1 of")
    assert main([str(last.folder), "--max-failures", "1"]) == 0
    assert capsys.readouterr().out == "end 1\n"


def test_what_was_noticed_of_a_crash_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = launch(tmp_path, 0, 0, None)
    (last.folder / "errors.txt").write_text("error: rank 3 of 8 (host n2, process 7) has not been heard of\nan echo\n")
    assert main([str(last.folder)]) == 0
    said = capsys.readouterr()
    assert said.out == "requeue\n"
    assert said.err == (
        "launch: error: rank 3 of 8 (host n2, process 7) has not been heard of; requeue 1 of at most 100\n"
    )
