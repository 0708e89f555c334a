"""Train a tokenizer, or see what one does to a text.

    python -m tools.tokenizer train austen --vocab-size 8192 --output austen-8k.model
    python -m tools.tokenizer show austen-8k.model "It is a truth universally acknowledged"

`train` takes the same sources as tools.prepare and leaves the same documents out for validation, so that a tokenizer
trained here can be given to tools.prepare and has not seen them. It is sentencepiece BPE with byte fallback.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models.errors import ConfigError
from pretrain.arguments import Parser
from pretrain.data.preparation import Settings, tokenizer_for
from pretrain.data.tokenizer import Tokenizer
from pretrain.files import write_atomically
from tools.command import run


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if options.command == "train":
        _train(options)
    else:
        _show(options.file, options.text)


def _train(options: argparse.Namespace) -> None:
    settings = Settings(
        vocab_size=options.vocab_size,
        text_key=options.text_key,
        validation_fraction=options.validation_fraction,
        seed=options.seed,
    )
    if options.output.exists() and not options.overwrite:
        raise ConfigError(f"{options.output} exists: add --overwrite to replace it, or name another file")
    model = tokenizer_for(options.sources, settings)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output, model)
    print(f"{options.output}: {Tokenizer(options.output).size} pieces")


def _show(file: Path, text: str) -> None:
    tokenizer = Tokenizer(file)
    ids = tokenizer.encode(text)
    for token, piece in zip(ids, tokenizer.pieces(ids), strict=True):
        print(f"{token:>7}  {piece!r}")
    print(f"{len(ids)} tokens, {len(text.encode()) / max(1, len(ids)):.2f} bytes a token, vocabulary {tokenizer.size}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.tokenizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train one on text")
    train.add_argument("sources", nargs="+", metavar="SOURCE", help="as for tools.prepare")
    train.add_argument("--vocab-size", type=int, default=4096, metavar="N", help="pieces (default: 4096)")
    train.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .model file to write")
    train.add_argument(
        "--text-key", default="text", metavar="KEY", help="the column that holds the text (default: text)"
    )
    train.add_argument(
        "--validation-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="of the documents, left out as tools.prepare does (default: 0.01)",
    )
    train.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
    train.add_argument("--overwrite", action="store_true", help="replace FILE")
    show = commands.add_parser("show", help="print the pieces and ids of a text")
    show.add_argument("file", type=Path, metavar="FILE", help="a sentencepiece .model file")
    show.add_argument("text", metavar="TEXT")
    return parser


if __name__ == "__main__":
    run(main)
