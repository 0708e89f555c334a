"""The bar that a trained model must pass: an interpolated Kneser-Ney n-gram over the same prepared tokens.

    python -m tools.ngram data/austen --order 4 --split validation --split test

It counts the training split and predicts every token of the other splits but their first, which are the targets that
training validates on. Like the model, it reads a split as one stream: contexts reach across the ends of documents.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from rich.console import Console

from models.errors import ConfigError
from pretrain.arguments import Parser
from pretrain.data.manifest import open_split, read_manifest
from tools.command import run


class KneserNey:
    """Interpolated Kneser-Ney (Chen and Goodman 1998, TR-10-98, section 4.1.6) with one discount per order.

    For a context h of k - 1 tokens, h' without its first, and a token w::

        p_k(w | h) = ( max(c(h w) - D_k, 0) + D_k |{v: c(h v) > 0}| p_{k-1}(w | h') ) / sum_v c(h v),    p_0 = 1 / V

    c counts occurrences at the highest order and distinct preceding tokens below it; an unseen h leaves it to
    p_{k-1}. D_k = n1 / (n1 + 2 n2), from the k-grams with c = 1 and c = 2; where none has c = 1, which would leave
    nothing to unseen tokens, D_k is 1/2.

    ``tokens``: int [n], the training stream, ``n >= order``. ``vocabulary``: V. Memory: about 100 bytes a token.
    """

    def __init__(self, tokens: np.ndarray, vocabulary: int, order: int) -> None:
        assert 1 <= order <= len(tokens), (order, len(tokens))
        assert len(tokens) * vocabulary < 2**63, "a k-gram's key is its context's id times the vocabulary, plus a token"
        self._vocabulary = vocabulary
        self._keys: list[np.ndarray] = []  # per order: the k-grams seen, as sorted keys; a k-gram's id is its place
        starts: list[np.ndarray] = []  # per order: where each k-gram is seen first
        ids = [np.zeros(len(tokens) + 1, np.int64)]  # per order from 0: the id of the k-gram that begins here
        for k in range(1, order + 1):
            keys, first, inverse = np.unique(
                ids[-1][: len(tokens) - k + 1] * vocabulary + tokens[k - 1 :], return_index=True, return_inverse=True
            )
            self._keys.append(keys)
            starts.append(first)
            ids.append(inverse)
        self._counts: list[np.ndarray] = []
        self._totals: list[np.ndarray] = []  # per order and context: sum over v of c(h v)
        self._types: list[np.ndarray] = []  # per order and context: |{v: c(h v) > 0}|
        self.discounts: list[float] = []  # from order 1 up
        contexts = 1
        for k, keys in enumerate(self._keys, 1):
            # Every distinct (k+1)-gram gives its last k tokens one distinct predecessor.
            seen = ids[k] if k == order else ids[k][starts[k] + 1]
            count = np.bincount(seen, minlength=len(keys))
            context = keys // vocabulary
            once, twice = np.count_nonzero(count == 1), np.count_nonzero(count == 2)
            self.discounts.append(once / (once + 2 * twice) if once else 0.5)
            self._counts.append(count)
            self._totals.append(np.bincount(context, weights=count, minlength=contexts))
            self._types.append(np.bincount(context, weights=count > 0, minlength=contexts))
            contexts = len(keys)

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """p(token | as many of those before it as the order takes) of every token of a stream: int [n] -> fp64 [n]."""
        p = np.full(len(tokens), 1.0 / self._vocabulary)
        ids = np.zeros(len(tokens) + 1, np.int64)  # of the (k-1)-gram that begins here, -1 if it was never seen
        for k, keys in enumerate(self._keys, 1):
            if k > len(tokens):
                break
            context = ids[: len(tokens) - k + 1]
            wanted = context * self._vocabulary + tokens[k - 1 :]
            ids = np.searchsorted(keys, wanted)
            ids[keys[np.minimum(ids, len(keys) - 1)] != wanted] = -1  # an unseen context's wanted keys are negative
            total = np.where(context >= 0, self._totals[k - 1][context], 0.0)
            count = np.where(ids >= 0, self._counts[k - 1][ids], 0)
            discount = self.discounts[k - 1]
            known = total > 0
            lower = p[k - 1 :]
            mass = np.maximum(count - discount, 0.0) + discount * self._types[k - 1][context] * lower
            lower[known] = mass[known] / total[known]
        return p


def read_tokens(folder: Path, split: str) -> tuple[np.ndarray, int]:
    """A prepared split as one stream, int64 [tokens], and the bytes of text behind it."""
    manifest = read_manifest(folder)
    shards = open_split(folder, manifest, split, verify=True)
    return np.concatenate(shards).astype(np.int64), manifest.split(split, folder).bytes


def main() -> None:
    parser = Parser(prog="python -m tools.ngram", description="Bits per byte of an interpolated Kneser-Ney n-gram.")
    parser.add_argument("data", type=Path, help="a folder made by tools.prepare")
    parser.add_argument("--order", type=int, default=4, metavar="N", help="the longest n-gram, in tokens (default 4)")
    parser.add_argument(
        "--split", action="append", metavar="NAME", help="what to predict (default: all that are not trained on)"
    )
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.data)
    splits = arguments.split or [name for name in manifest.splits if name != "train"]
    targets = {name: read_tokens(arguments.data, name) for name in splits}
    training, _ = read_tokens(arguments.data, "train")
    if not 1 <= arguments.order <= len(training):
        raise ConfigError(
            f"--order is {arguments.order}: write a number from 1 to {len(training)}, the training tokens"
        )
    with Console(stderr=True).status("counting and predicting"):
        model = KneserNey(training, manifest.vocabulary, arguments.order)
        nats = {name: -np.log(model.probabilities(tokens)[1:]).sum() for name, (tokens, _) in targets.items()}
    discounts = ", ".join(f"{d:.3f}" for d in model.discounts)
    print(f"Kneser-Ney {arguments.order}-gram of {len(training):,} tokens, discounts {discounts}")
    for name, (tokens, size) in targets.items():
        bits, mean = nats[name] / math.log(2) / size, nats[name] / (len(tokens) - 1)
        print(f"  {name:<10} {bits:.4f} bits per byte, {mean:.4f} nats a token")


if __name__ == "__main__":
    run(main)
