"""The console: a bar for people, plain lines for files, nothing on standard output."""

from __future__ import annotations

import io
import re

import pytest

from pretrain.telemetry import open_console

VALUES = {
    "loss": 3.21014,
    "tokens_per_second": 12345.6,
    "mfu": 0.412,
    "lr": 0.1,
    "batch_hash": "00ff",
    "grad_norm": None,
}
VALIDATION = {"val_loss": 3.3, "val_bits_per_byte": 1.98}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(stream: io.StringIO, rank: int = 0) -> str:
    console = open_console(steps=200, start=50, rank=rank, stream=stream)
    console.message("optimizer [msgdw] starts")
    for step in range(51, 101):
        console.advance(step)
    console.report(100, VALUES)
    console.report(100, VALIDATION)
    console.report(110, {"loss": 3.0, "mfu": None})
    console.close()
    return stream.getvalue()


def test_a_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich would take any stream for a terminal
    clock = iter([0.0, 100.0, 100.0, 120.0])
    monkeypatch.setattr("pretrain.telemetry.console.time.monotonic", lambda: next(clock))
    assert drive(io.StringIO()).splitlines() == [
        "optimizer [msgdw] starts",
        "step 100/200  loss 3.2101  12,346 tok/s  MFU 41.2%  elapsed 0:01:40  left 0:03:20",
        "step 100/200  loss 3.2101  val 3.3000  (1.980 bits/byte)  12,346 tok/s  MFU 41.2%"
        "  elapsed 0:01:40  left 0:03:20",
        "step 110/200  loss 3.0000  val 3.3000  (1.980 bits/byte)  12,346 tok/s  MFU 41.2%"
        "  elapsed 0:02:00  left 0:03:00",
    ]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    output = drive(Terminal())
    assert "optimizer [msgdw] starts" in output
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).rstrip().splitlines()[-1]
    assert "110/200" in last
    assert "loss 3.0000  val 3.3000  (1.980 bits/byte)  12,346 tok/s  MFU 41.2%" in last
    assert capsys.readouterr() == ("", "")


def test_standard_output_is_untouched_while_the_bar_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    console = open_console(steps=2, start=0, rank=0, stream=terminal)
    print("for a script")
    console.close()
    assert capsys.readouterr().out == "for a script\n"
    assert "for a script" not in terminal.getvalue()


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    open_console(steps=2, start=0, rank=0).message("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in drive(Terminal())


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert drive(Terminal(), rank=1) == ""
    assert capsys.readouterr() == ("", "")
