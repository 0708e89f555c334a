"""Text to a folder that `python -m pretrain` trains on: documents split, tokenized, packed, committed.

A SOURCE is one of
  austen         Jane Austen's novels, which ship with the project, with their own test and validation splits
  public-domain  42 MB of English prose, fetched into OUTPUT/sources by tools.corpora
  a file         .txt, .jsonl, .json or .parquet; text and JSON also as .gz, .xz or .zst
  a folder       of those
  owner/name     a dataset on the Hugging Face hub
A text file is one document, a line or row of the others is one. Interrupt it as you like: the same command goes on
where it was, and does nothing once all is done.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pretrain.arguments import Parser
from pretrain.data.preparation import Settings, prepare
from tools import corpora
from tools.command import run

PUBLIC_DOMAIN = "public-domain"


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    settings = Settings(
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size,
        text_key=options.text_key,
        subset=options.subset,
        split=options.split,
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        seed=options.seed,
    )
    output = options.output or Path("data") / Path(options.sources[0]).stem
    try:
        sources = [_local(source, output) for source in options.sources]
        manifest, fresh = prepare(sources, output, settings, workers=options.workers, overwrite=options.overwrite)
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(75)
    print(f"{output} is {'ready' if fresh else 'already prepared from this, nothing to do'}")
    for name, split in manifest.splits.items():
        ratio = split.bytes / split.tokens
        print(f"  {name:<10} {split.documents:>9,} documents {split.tokens:>13,} tokens, {ratio:.2f} bytes a token")


def _local(source: str, output: Path) -> str:
    if source != PUBLIC_DOMAIN:
        return source
    folder = output / "sources"
    corpora.fetch(folder, list(corpora.CORPORA))
    return str(folder)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m tools.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE")
    add("--output", type=Path, help="the folder to make (default: data/ and the first source's name)")
    add("--tokenizer", type=Path, metavar="FILE", help="a sentencepiece model (default: train one on the text)")
    add("--vocab-size", type=int, default=4096, metavar="N", help="pieces of the tokenizer to train (default: 4096)")
    add("--text-key", default="text", metavar="KEY", help="the column that holds the text (default: text)")
    add("--subset", metavar="NAME", help="of a hub dataset: its configuration")
    add("--split", default="train", metavar="NAME", help="of a hub dataset (default: train)")
    add(
        "--validation-fraction",
        type=float,
        default=0.01,
        metavar="X",
        help="of the documents, chosen by a hash of their text (default: 0.01; austen has its own)",
    )
    add("--shard-tokens", type=int, default=1 << 26, metavar="N", help="tokens in one file (default: 67108864)")
    add("--seed", type=int, default=0, help="of the choice of validation documents (default: 0)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="threads (default: one a core)")
    add("--overwrite", action="store_true", help="replace what another preparation left in the folder")
    return parser


if __name__ == "__main__":
    run(main)
