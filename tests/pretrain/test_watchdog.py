"""Whom the watch gives up, and when: a function of beats and a clock, tried without processes or waiting."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from pretrain.watchdog import Beat, Phase, Seen, State, Verdict, judge, one_line, period_of

SILENCE, TIMEOUT = 30.0, 600.0
PERIOD = period_of(SILENCE)


class Ranks:
    """Ranks that beat, and the one that looks at them every period, on a clock of the test's own."""

    def __init__(self, size: int, watched: list[int] | None = None) -> None:
        self.now = 0.0
        self.size = size
        self.beats = {rank: Beat(0, f"host{rank // 8}", 100 + rank) for rank in watched or range(size)}
        self.seen = {rank: Seen(beat, 0.0, 0.0) for rank, beat in self.beats.items()}

    def work(self, rank: int, step: int, phase: Phase = "step", collectives: int = 0) -> None:
        self.beats[rank] = replace(self.beats[rank], step=step, phase=phase, collectives=collectives)

    def state(self, rank: int, state: State, error: str = "") -> None:
        self.beats[rank] = replace(self.beats[rank], state=state, error=error)

    def alarm(self, rank: int) -> None:
        self.beats[rank] = replace(self.beats[rank], alarm=True)

    def look(self, beating: set[int], wait: float = PERIOD) -> Verdict | None:
        """The verdict after one more period in which the ranks ``beating`` beat; what the others say is not heard."""
        self.now += wait
        for rank in beating:
            self.beats[rank] = replace(self.beats[rank], number=self.beats[rank].number + 1)
            self.seen[rank] = self.seen[rank].then(self.beats[rank], self.now)
        for rank in self.seen.keys() - beating:
            self.seen[rank] = self.seen[rank].then(self.seen[rank].beat, self.now)
        return judge(self.seen, self.size, self.now, SILENCE, TIMEOUT)

    def until_verdict(self, beating: set[int], limit: float) -> tuple[float, Verdict]:
        """Seconds from now on, and the verdict, which falls within ``limit`` seconds."""
        begin = self.now
        while self.now - begin <= limit:
            if verdict := self.look(beating):
                return self.now - begin, verdict
        raise AssertionError(f"no verdict after {limit} s")


def named_in(text: str) -> set[int]:
    """The ranks that a verdict names, alone or in a list."""
    listed = re.match(r"ranks ([\d, ]+) of", text)
    numbers = listed[1].split(", ") if listed else re.findall(r"rank (\d+) of", text)
    return {int(number) for number in numbers}


def test_a_silent_rank_is_named_with_all_that_is_known_of_it() -> None:
    ranks = Ranks(2)
    ranks.work(1, 7, "data")
    assert ranks.look({0, 1}) is None
    took, verdict = ranks.until_verdict({0}, SILENCE + PERIOD)
    assert took > SILENCE
    assert verdict.own == ()
    assert verdict.text == (
        "rank 1 of 2 (host host0, process 101) has not been heard of for 32 s, last in step 7 (data): it was killed, "
        "or its machine froze; every rank ends; start again to go on from the last committed checkpoint"
    )


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_dead_are_named_in_time_and_nobody_else(data: st.DataObject) -> None:
    """Whatever the others do: work, fail in the dead ones' wake, get SIGTERM, or neither."""
    size = data.draw(st.integers(2, 12))
    dead = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    alive = set(range(size)) - dead
    echo = data.draw(st.sets(st.sampled_from(sorted(alive))))
    warned = data.draw(st.sets(st.sampled_from(sorted(alive))))
    ranks = Ranks(size)
    for _ in range(data.draw(st.integers(1, 20))):
        assert ranks.look(set(range(size))) is None
    for rank in echo:
        ranks.state(rank, "failed", "RuntimeError: Connection closed by peer")
    for rank in warned:
        ranks.alarm(rank)
    took, verdict = ranks.until_verdict(alive, SILENCE + PERIOD)
    assert verdict.own == ()
    assert named_in(verdict.text) == dead
    assert took <= (7 * PERIOD if echo or warned else SILENCE + PERIOD)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_whoever_is_heard_of_and_moves_is_left_alone(data: st.DataObject) -> None:
    """Beats come late, by less than silence; progress is slow, but some rank makes it within the timeout."""
    size = data.draw(st.integers(2, 5))
    ranks = Ranks(size)
    quiet = dict.fromkeys(range(size), 0.0)
    still = 0.0
    for i in range(data.draw(st.integers(1, 60))):
        wait = data.draw(st.sampled_from([PERIOD, PERIOD, 25.0]))
        beating = {r for r in range(size) if quiet[r] + wait > SILENCE or data.draw(st.booleans())}
        quiet = {r: 0.0 if r in beating else quiet[r] + wait for r in quiet}
        moves = [r for r in beating if still + wait > TIMEOUT or data.draw(st.integers(0, 9)) == 0]
        still = 0.0 if moves else still + wait
        for rank in moves:
            ranks.work(rank, i + 1)
        assert ranks.look(beating, wait) is None


@pytest.mark.parametrize("alarm", [True, False])
def test_an_alarm_shortens_the_patience(alarm: bool) -> None:
    ranks = Ranks(3)
    assert ranks.look({0, 1, 2}) is None
    if alarm:
        ranks.alarm(0)
    took, verdict = ranks.until_verdict({0, 1}, SILENCE + PERIOD)
    assert verdict.text.startswith("rank 2 of 3 ")
    assert took == (7 * PERIOD if alarm else SILENCE + PERIOD)


def test_an_alarm_gives_everyone_the_time_to_be_heard() -> None:
    """A rank that was quiet for a while when SIGTERM came is not condemned at once."""
    ranks = Ranks(2)
    for _ in range(12):  # periods, 24 s: less than silence
        assert ranks.look({0}) is None
    ranks.alarm(0)
    assert ranks.look({0}) is None
    for _ in range(20):
        assert ranks.look({0, 1}) is None


def test_the_one_who_computes_forever_and_not_those_who_wait_for_it() -> None:
    ranks = Ranks(3)
    for rank in range(3):
        ranks.work(rank, 5, "step", collectives=40 if rank == 1 else 41)
    took, verdict = ranks.until_verdict({0, 1, 2}, TIMEOUT + 3 * PERIOD)
    assert took > TIMEOUT
    assert verdict.text.startswith(
        "rank 1 of 3 (host host0, process 101) has made no progress for 602 s, in step 5 (step)"
    )
    assert "the others wait for it" in verdict.text


def test_those_in_an_earlier_step_are_behind() -> None:
    ranks = Ranks(8)
    for rank in range(8):
        ranks.work(rank, 5 if rank in (2, 3) else 6, "data", collectives=50)
    _, verdict = ranks.until_verdict(set(range(8)), TIMEOUT + 3 * PERIOD)
    assert named_in(verdict.text) == {2, 3}
    assert "have made no progress" in verdict.text
    assert "the others wait for them" in verdict.text


def test_nobody_is_behind() -> None:
    ranks = Ranks(2)
    for rank in range(2):
        ranks.work(rank, 5, "checkpoint", collectives=41)
    _, verdict = ranks.until_verdict({0, 1}, TIMEOUT + 3 * PERIOD)
    assert verdict.text.startswith("all ranks have made no progress for 602 s, in step 5 (checkpoint): ")
    assert "parallel.timeout" in verdict.text


@pytest.mark.parametrize(
    "move",
    [
        lambda ranks, i: ranks.work(1, 5, "step", collectives=i),
        lambda ranks, i: ranks.work(1, i),
        lambda ranks, i: ranks.work(1, 5, ("step", "data")[i % 2]),
    ],
)
def test_progress_is_a_step_a_phase_or_a_collective_of_any_rank(move: Callable[[Ranks, int], None]) -> None:
    ranks = Ranks(2)
    for i in range(1, 4):
        move(ranks, i)
        for _ in range(int(0.9 * TIMEOUT / PERIOD)):
            assert ranks.look({0, 1}) is None


def test_a_failure_of_its_own_once_all_others_are_known_to_live() -> None:
    ranks = Ranks(3)
    ranks.work(2, 9)
    assert ranks.look({0, 1, 2}) is None
    ranks.state(2, "failed", "ValueError: a wire is loose")
    took, verdict = ranks.until_verdict({0, 1, 2}, 10 * PERIOD)
    assert took <= 3 * PERIOD
    assert verdict.own == (2,), "which raises its own error"
    assert verdict.text.startswith(
        "rank 2 of 3 (host host0, process 102) failed in step 9 (step): ValueError: a wire is loose; every rank ends"
    )


def test_the_first_failure_is_named_not_its_echo() -> None:
    ranks = Ranks(3)
    ranks.state(2, "failed", "ValueError: the cause")
    assert ranks.look({0, 1, 2}) is None
    ranks.state(0, "failed", "RuntimeError: the echo")
    _, verdict = ranks.until_verdict({0, 1, 2}, 10 * PERIOD)
    assert verdict.own == (2,)
    assert "the cause" in verdict.text


def test_what_all_agree_on_needs_no_verdict_on_anyone() -> None:
    ranks = Ranks(3)
    for rank in range(3):
        ranks.state(rank, "failed", "OSError: no space left")
    assert ranks.look({0, 1, 2}) == Verdict("", (0, 1, 2))


def test_a_rank_that_left_is_not_silent() -> None:
    ranks = Ranks(2)
    ranks.state(1, "left")
    assert ranks.look({0, 1}) is None
    for i in range(1000):
        ranks.work(0, i)
        assert ranks.look({0}) is None


def test_others_judge_rank_0_by_its_silence_alone() -> None:
    ranks = Ranks(8, watched=[0, 5])
    for _ in range(int(2 * TIMEOUT / PERIOD)):
        assert ranks.look({0, 5}) is None, "whether there is progress shows only in all beats"
    ranks.state(5, "failed", "RuntimeError: Connection closed by peer")
    for _ in range(20):
        assert ranks.look({0, 5}) is None, "rank 0 knows who is to blame"
    took, verdict = ranks.until_verdict({5}, SILENCE)
    assert took == 5 * PERIOD + PERIOD
    assert verdict.text.startswith("rank 0 of 8 ")


def test_many_are_named_by_their_numbers() -> None:
    ranks = Ranks(16)
    _, verdict = ranks.until_verdict(set(range(8)), SILENCE + PERIOD)
    assert verdict.text.startswith(
        "ranks 8, 9, 10, 11, 12, 13, 14, 15 of 16 have not been heard of for 32 s, last at start"
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a wire\nis loose\n"), "ValueError: is loose"),
        (RuntimeError(), "RuntimeError: "),
        (ConfigError("model.depth is 0: write 1 or more"), "model.depth is 0: write 1 or more"),
        (SystemExit(128 + signal.SIGTERM), "it was told to end (SIGTERM)"),
    ],
)
def test_an_error_fits_on_a_line(error: BaseException, line: str) -> None:
    assert one_line(error) == line


@given(st.floats(0.1, 1e4))
def test_five_beats_fit_into_the_silence(silence: float) -> None:
    assert 0 < 5 * period_of(silence) <= silence * (1 + 1e-12)  # rounding of a division and a product
