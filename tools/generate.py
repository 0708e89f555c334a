"""Sample text from a run's newest checkpoint.

python -m tools.generate runs/tiny --prompt "It is a truth" --tokens 200

One prompt is written as its tokens come. Several, each a --prompt or a line of --prompts FILE, go through the model
together, and their texts stand under each other with a line --- between two; prompt i (from 0) is continued as if it
were alone under the seed --seed + i. A text ends after --tokens tokens, or where the model ends the document.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from models.errors import ConfigError
from models.generation import sample
from pretrain.arguments import Parser
from pretrain.data import Tokenizer
from tools.command import require_device, run
from tools.loading import load_run

_AT_ONCE = 64  # prompts: what they keep in memory grows with their number
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def main() -> None:
    arguments = _parser().parse_args()
    prompts = _prompts(arguments.prompt, arguments.prompts)
    _check(arguments, len(prompts))
    trained = load_run(arguments.run, torch.device(arguments.device))
    tokenizer = trained.tokenizer
    rows = [tokenizer.encode(prompt) or [tokenizer.eos] for prompt in prompts]
    go_on = partial(
        sample,
        trained.model,
        count=arguments.tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        pieces=tokenizer.size,
        stop=tokenizer.eos,
        cached=not arguments.no_cache,
    )
    begin, given = time.perf_counter(), sum(map(len, rows))
    if len(rows) == 1:
        _stream(tokenizer, rows[0], go_on(rows, seed=arguments.seed))
    else:
        for first in range(0, len(rows), _AT_ONCE):
            print("---\n" if first else "", end="")
            group = rows[first : first + _AT_ONCE]
            _together(tokenizer, group, go_on(group, seed=arguments.seed + first), arguments.tokens)
    if arguments.speed:
        seconds, added = time.perf_counter() - begin, sum(map(len, rows)) - given
        print(f"{added} tokens in {seconds:.2f} s, {added / seconds:.1f} tokens/s", file=sys.stderr)


def _stream(tokenizer: Tokenizer, row: list[int], steps: Iterable[Sequence[int | None]]) -> None:
    """Write the row's text, and go on as tokens are added to it; a character is written when its last byte is there."""
    written = ""

    def write(text: str) -> str:
        print(text[len(written) :], end="", flush=True)
        return text

    # until the bytes of a character are complete they decode to replacement characters
    written = write(tokenizer.decode(row).rstrip(_UNFINISHED))
    for tokens in steps:
        row += [token for token in tokens if token is not None]
        written = write(tokenizer.decode(row).rstrip(_UNFINISHED))
    write(tokenizer.decode(row) + "\n")


def _together(tokenizer: Tokenizer, rows: list[list[int]], steps: Iterable[Sequence[int | None]], most: int) -> None:
    """Add the tokens to the rows, under a bar, and write their texts."""
    for tokens in track(steps, "tokens", total=most, console=Console(stderr=True), transient=True):
        for row, token in zip(rows, tokens, strict=True):
            row += [] if token is None else [token]
    print("\n---\n".join(tokenizer.decode(row) for row in rows))


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """Those of the command line, then the lines of the file; one that is empty where there are none."""
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ConfigError(f"--prompts {file}: {reason}; give a text file with a prompt a line") from error
        filled = [line for line in lines if line.strip()]
        if not filled:
            raise ConfigError(f"--prompts {file}: there is no prompt in it; write one a line")
        prompts += filled
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"--prompt {prompt!r} is not UTF-8; write it in that encoding") from error
    return prompts or [""]


def _check(arguments: argparse.Namespace, prompts: int) -> None:
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens is {arguments.tokens}: write a positive number")
    if not arguments.temperature >= 0:
        raise ConfigError(f"--temperature is {arguments.temperature}: write 0 or more")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p is {arguments.top_p}: write a share above 0, at most 1")
    if not 0 <= arguments.seed <= 2**63 - prompts:
        raise ConfigError(f"--seed is {arguments.seed}: write a number from 0 to {2**63 - prompts}")
    require_device(arguments.device)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to go on from; empty: a new document"
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt a line")
    parser.add_argument("--tokens", type=int, default=120, metavar="N", help="how many to add at most (default 120)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default 0.8)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, metavar="X", help="share of the probability to draw from (default 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default 0)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default cpu)")
    parser.add_argument("--no-cache", action="store_true", help="compute all keys and values anew for every token")
    parser.add_argument("--speed", action="store_true", help="say at the end how fast it was, on standard error")
    return parser


if __name__ == "__main__":
    run(main)
