from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import ConfigError
from models.loss import IGNORE
from pretrain.config import DataConfig
from pretrain.data import EvaluationSet, open_source
from pretrain.data.manifest import TOKENIZER, Manifest, Shard, Split, sha256_of
from pretrain.data.permutation import Permutation
from pretrain.data.prepared import PreparedSource


def write_folder(folder: Path, shard_sizes: list[int], validation: int = 0) -> None:
    """A prepared folder whose training token t is the number t, so that a sample shows where it was read."""
    folder.mkdir(exist_ok=True)
    (folder / TOKENIZER).write_bytes(b"only its hash matters here")
    splits = {}
    for name, sizes in {"train": shard_sizes, "validation": [validation] if validation else []}.items():
        shards, start = [], 0
        for k, size in enumerate(sizes):
            file = folder / f"{name}-{k:05d}.bin"
            np.arange(start, start + size, dtype="<u4").tofile(file)
            shards.append(Shard(file.name, size, sha256_of(file)))
            start += size
        if sizes:
            splits[name] = Split(tokens=start, documents=1, bytes=3 * start, shards=tuple(shards))
    Manifest("fingerprint", {}, sha256_of(folder / TOKENIZER), 1 << 20, 2, "<u4", splits).write(folder)


@given(st.integers(1, 3000), st.integers(0, 1 << 40))
def test_permutation_is_a_bijection(n: int, seed: int) -> None:
    order = Permutation(n, (seed, 0))(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))


def test_permutation_looks_random_and_follows_its_seed() -> None:
    n = 1000
    orders = [Permutation(n, (7, epoch))(np.arange(n)) for epoch in range(200)]
    for a in orders[1:4]:
        assert np.count_nonzero(a == orders[0]) < 10  # about one place in n agrees by chance
    # Over 200 seeds, what stands at a place is uniform: its mean has the standard deviation n / sqrt(12 * 200), and of
    # 1000 means the largest deviation is below 5 of them.
    means = np.mean(orders, axis=0)
    assert np.abs(means - (n - 1) / 2).max() < 5 * n / math.sqrt(12 * 200)


def test_permutation_of_more_than_memory_holds() -> None:
    order = Permutation(10**15, (0,))
    values = order(np.arange(10_000))
    assert len(np.unique(values)) == 10_000
    assert values.min() >= 0
    assert values.max() < 10**15


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=5).filter(lambda s: sum(s) > 9),
    length=st.integers(1, 8),
    seed=st.integers(0, 100),
    epoch=st.integers(0, 3),
)
def test_an_epoch_predicts_every_token_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, seed: int, epoch: int
) -> None:
    folder = tmp_path_factory.mktemp("prepared")
    write_folder(folder, sizes)
    source = PreparedSource(folder, length, seed)
    total, n = sum(sizes), sum(sizes) // length
    assert source.samples_per_epoch == n
    samples = source.read(range(epoch * n, (epoch + 1) * n))
    assert samples.shape == (n, length + 1)
    assert samples.dtype == np.int64
    # tokens are their own positions: a window runs on in the ring, across the borders of shards
    assert np.array_equal(samples[:, 1:], (samples[:, :1] + np.arange(1, length + 1)) % total)
    targets = samples[:, 1:].ravel()
    assert len(np.unique(targets)) == n * length  # none twice; total % length < length are left for another epoch


def test_epochs_differ_in_cut_and_order(tmp_path: Path) -> None:
    write_folder(tmp_path, [1000])
    source = PreparedSource(tmp_path, 10, seed=0)
    epochs = [source.read(range(100 * e, 100 * (e + 1)))[:, 0] for e in range(4)]
    assert len({int(epoch[0]) for epoch in epochs}) == 4
    assert len({int(epoch[0]) % 10 for epoch in epochs}) > 1  # the windows' grid has moved
    other = PreparedSource(tmp_path, 10, seed=1).read(range(100))[:, 0]
    assert not np.array_equal(other, epochs[0])


@settings(max_examples=25)
@given(st.lists(st.integers(0, 500), max_size=20), st.randoms(use_true_random=False))
def test_a_sample_depends_on_its_index_alone(
    tmp_path_factory: pytest.TempPathFactory, indices: list[int], random: object
) -> None:
    folder = tmp_path_factory.mktemp("prepared")
    write_folder(folder, [70, 50])
    reference = PreparedSource(folder, 7, seed=3).read(range(501))
    assert np.array_equal(PreparedSource(folder, 7, seed=3).read(indices), reference[indices])


@given(total=st.integers(2, 200), length=st.integers(1, 50), cut=st.integers(1, 199))
def test_evaluation_predicts_every_token_but_the_first_once(total: int, length: int, cut: int) -> None:
    text = np.arange(1000, 1000 + total, dtype=np.uint16)
    evaluation = EvaluationSet([text[:cut], text[cut:]], length, eos=2, bytes=5 * total)
    inputs, targets = evaluation.read(range(evaluation.count))
    real = targets != IGNORE
    assert targets[real].tolist() == list(range(1001, 1000 + total))
    assert np.array_equal(inputs[real], targets[real] - 1)
    assert (inputs[~real] == 2).all()
    assert evaluation.tokens == total - 1 == real.sum()
    assert real[:-1].all()  # only the last window is filled up


def test_validation_comes_with_its_bytes(tmp_path: Path) -> None:
    write_folder(tmp_path, [100], validation=50)
    source = open_source(DataConfig(path=str(tmp_path), sequence_length=8), seed=0)
    assert source.validation is not None
    assert (source.validation.tokens, source.validation.bytes, source.validation.count) == (49, 150, 7)
    write_folder(tmp_path, [100])
    assert open_source(DataConfig(path=str(tmp_path), sequence_length=8), seed=0).validation is None


def test_state_belongs_to_one_folder(tmp_path: Path) -> None:
    write_folder(tmp_path, [100])
    source = PreparedSource(tmp_path, 8, 0)
    source.load_state(source.state())
    with pytest.raises(ConfigError, match="not what the checkpoint was trained on"):
        source.load_state({"prepared": "another"})


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "manifest.json").unlink(), "holds no prepared data: run `python -m tools.prepare"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda f: flip(f / "train-00001.bin"), "train-00001.bin is corrupted"),
        (lambda f: (f / "train-00001.bin").unlink(), "train-00001.bin is missing"),
        (lambda f: (f / "train-00000.bin").write_bytes(b"1234"), "train-00000.bin has 4 bytes instead of 400"),
        (lambda f: flip(f / "validation-00000.bin"), "validation-00000.bin is corrupted"),
        (lambda f: flip(f / TOKENIZER), "is not the tokenizer"),
        (lambda f: (f / TOKENIZER).unlink(), "tokenizer.model is missing"),
        (lambda f: write_folder(f, [8]), "fewer than one sample"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path: Path, damage: object, message: str) -> None:
    write_folder(tmp_path, [100, 100], validation=20)
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(ConfigError) as caught:
        open_source(DataConfig(path=str(tmp_path), sequence_length=8), seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ranks_share_the_hashing_of_contents_if_asked(tmp_path: Path) -> None:
    write_folder(tmp_path, [100, 100, 50])
    flip(tmp_path / "train-00001.bin")
    config = DataConfig(path=str(tmp_path), sequence_length=8)
    open_source(DataConfig(path=str(tmp_path), sequence_length=8, verify=False), seed=0)
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            if rank == 1 % world_size:  # the second shard is its
                with pytest.raises(ConfigError, match=r"train-00001\.bin is corrupted"):
                    open_source(config, seed=0, rank=rank, world_size=world_size)
            else:
                open_source(config, seed=0, rank=rank, world_size=world_size)
