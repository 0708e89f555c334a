"""A prepared folder of random tokens: speed does not depend on what is read, and a benchmark needs no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pretrain.data.manifest import TOKENIZER, Manifest, Shard, Split, sha256_of


def random_tokens(folder: Path, vocabulary: int, tokens: int) -> None:
    """Make ``folder``, with a training split alone and no tokenizer: it can be trained on, but not shown."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "<u2" if vocabulary <= 1 << 16 else "<u4"
    drawn = np.random.default_rng(0).integers(vocabulary, size=tokens).astype(dtype)
    drawn.tofile(folder / "train-00000.bin")
    (folder / TOKENIZER).write_bytes(b"random tokens have no tokenizer\n")
    shard = Shard("train-00000.bin", tokens, sha256_of(folder / "train-00000.bin"))
    Manifest(
        fingerprint=shard.sha256,
        inputs={"random": {"vocabulary": vocabulary, "tokens": tokens}},
        tokenizer_sha256=sha256_of(folder / TOKENIZER),
        vocabulary=vocabulary,
        eos=0,
        dtype=dtype,
        splits={"train": Split(tokens, 1, tokens * np.dtype(dtype).itemsize, (shard,))},
    ).write(folder)
