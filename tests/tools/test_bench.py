"""The benchmark measures what it says: our real step, a reference that is GPT-2, turns, and ratios within a round."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.errors import ConfigError
from pretrain.cli import dump
from pretrain.config import LogConfig, RunConfig
from tests.tools.small_run import WORLD, prepare_small, small_config, train_small
from tools import bench
from tools.contenders import VARIANTS, Contender, OurSteps, like_nanogpt, nanogpt, of_two, with_nanogpt
from tools.nanogpt import NanoGPT, NanoGPTLoop

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hf"))
        config = small_config(folder, prepare_small(folder))
        yield replace(config, model=replace(config.model, vocab_size=300))


@pytest.mark.parametrize("masked", [False, True])
def test_our_step_is_the_trainer_s(config: RunConfig, masked: bool) -> None:
    config = replace(config, name=f"masked-{masked}", data=replace(config.data, document_mask=masked))
    trainer, _ = train_small(config)
    steps = OurSteps(config, WORLD)
    try:
        for _ in range(trainer.counts.steps):
            steps.step()
    finally:
        steps.close()
    expected = trainer.engine.model.state_dict()
    for name, found in steps.engine.model.state_dict().items():
        assert torch.equal(found, expected[name]), name


def test_inspected_steps_are_timed_with_what_they_write(config: RunConfig) -> None:
    steps = OurSteps(replace(config, log=LogConfig(inspect_every=2)), WORLD)
    assert steps.folder is not None
    folder = Path(steps.folder.name)
    for _ in range(5):
        steps.step()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all("update_ratio/embedding.weight" in line for line in lines)
    assert list((folder / "tensorboard").iterdir())
    steps.close()
    assert not folder.exists()


def test_the_reference_is_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = GPT2Config(
        vocab_size=50,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=3,
        activation_function="gelu",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    theirs = GPT2LMHeadModel(sizes).double()
    mine = NanoGPT(vocabulary=50, width=24, depth=2, heads=3, length=16).double()
    with torch.no_grad():
        for p in mine.parameters():
            p.normal_(std=0.3)
        for p in theirs.parameters():
            p.zero_()  # its biases, which nanoGPT has not
        gpt = theirs.transformer
        pairs = [(gpt.wte, mine.tokens), (gpt.wpe, mine.positions), (gpt.ln_f, mine.norm)]
        for block, other in zip(gpt.h, mine.blocks, strict=True):
            pairs += [(block.ln_1, other.attention_norm), (block.ln_2, other.mlp_norm)]
            pairs += [(block.attn.c_attn, other.attention.qkv), (block.attn.c_proj, other.attention.out)]
            pairs += [(block.mlp.c_fc, other.up), (block.mlp.c_proj, other.down)]
        for hf, module in pairs:  # its linear layers are transposed
            weight = module.weight
            hf.weight.copy_(weight if hf.weight.shape == weight.shape and "Conv" not in type(hf).__name__ else weight.T)
    tokens = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(0))
    logits = theirs(tokens[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    found = mine(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)  # fp64, another order of sums


def test_the_reference_learns_the_text(tmp_path: Path) -> None:
    tokens = np.tile(np.arange(10, dtype="<u2"), 50)
    tokens.tofile(tmp_path / "train.bin")
    torch.manual_seed(0)
    model = NanoGPT(vocabulary=10, width=32, depth=1, heads=2, length=8)
    sizes = {"length": 8, "micro_batch": 4, "accumulation": 2}
    loop = NanoGPTLoop(model, tmp_path / "train.bin", "<u2", CPU, **sizes, bf16=False, compiled=False)
    for _ in range(120):
        loop.step()
    text = torch.arange(9)[None] % 10
    assert model(text[:, :-1], text[:, 1:]).item() < 1.0  # ln 10 = 2.3 before


@pytest.mark.parametrize("depth", [1, 3])
def test_the_stack_has_the_reference_s_parameters(config: RunConfig, depth: int) -> None:
    config = replace(config, model=replace(config.model, depth=depth, plan="llama", ffn_width=100))
    reference = nanogpt(config, WORLD, 0)
    steps = OurSteps(like_nanogpt(config), WORLD)
    steps.close()
    ours = [tuple(p.shape) for p in steps.engine.model.parameters()]
    assert reference.parameters == sum(p.numel() for p in steps.engine.model.parameters())
    assert ours.count((32,)) == 2 * depth + 1  # norms without biases
    assert ours.count((128, 32)) == depth  # four widths, whatever the configuration's feed-forward


class Recorder:
    """Steps that note whose they are and pass a given time on a clock of the test's own."""

    def __init__(self, name: str, seconds: float, calls: list[str], clock: list[float]) -> None:
        self.name, self.seconds, self.calls, self.clock = name, seconds, calls, clock

    def step(self) -> None:
        self.calls.append(self.name)
        self.clock[0] += self.seconds

    def close(self) -> None: ...


def test_contenders_take_turns_and_are_timed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], list[str]()
    monkeypatch.setattr("tools.bench.time.perf_counter", lambda: clock[0])
    contenders = [
        Contender("a", "fp32", 1, 100, Recorder("a", 2.0, calls, clock), 0),
        Contender("b", "fp32", 1, 50, Recorder("b", 0.5, calls, clock), 0),
    ]
    rates = bench.measure(contenders, pairs=3, steps=2, device=CPU)
    assert "".join(calls) == "aabb" + "aaabbb" * 3  # warm-up, then one settling and two timed steps a turn
    np.testing.assert_allclose(rates, [[50.0] * 3, [100.0] * 3])


def test_ratios_are_taken_round_by_round() -> None:
    contenders = [
        Contender("nanogpt", "fp32", 10, 1, Recorder("", 0, [], []), 0),
        Contender("mine", "bf16", 10, 1, Recorder("", 0, [], []), 0),
    ]
    rates = np.array([[100.0, 10.0, 50.0], [150.0, 20.0, 50.0]])
    (first, second) = bench.record(contenders, rates)
    assert first["ratio"] == [1, 1, 1]
    assert second["ratio"] == [1.5, 2.0, 1.0]
    line = " ".join(bench.table(contenders, rates)[2].split())
    assert line.split()[2] == "50"
    assert "1.500 1.000 to 2.000" in line  # not the ratio of the medians, which is 1
    (shipped,) = bench.as_shipped(contenders, rates, "mine", "bf16", CPU)
    assert shipped == "mine as it says (bf16) to nanogpt as it runs on cpu (fp32): 1.500 (1.000 to 2.000)"
    assert bench.as_shipped(contenders[1:], rates[1:], "mine", "bf16", CPU) == []


def close(contenders: Sequence[Contender]) -> Sequence[Contender]:
    for contender in contenders:
        contender.steps.close()
    return contenders


def test_variants_change_both_sides(config: RunConfig) -> None:
    found = close(list(with_nanogpt(config, "mine", ["bf16", "fp32"], WORLD)))
    assert [(c.name, c.variant, c.base) for c in found] == [
        ("nanogpt", "bf16", 0),
        ("stack", "bf16", 0),
        ("mine", "bf16", 0),
        ("nanogpt", "fp32", 3),
        ("stack", "fp32", 3),
        ("mine", "fp32", 3),
    ]
    assert {c.tokens for c in found} == {128}
    shallow = replace(config, model=replace(config.model, depth=1))
    found = close(list(of_two(config, "mine", shallow, "other", [], WORLD)))
    assert [(c.name, c.variant, c.base) for c in found] == [("other", "fp32", 0), ("mine", "fp32", 0)]
    assert found[0].parameters < found[1].parameters


def test_the_command_prints_and_appends(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(config))
    command = [str(path), "--model.depth", "1", "--pairs", "2", "--steps", "1"]
    command += ["--variants", "fp32", "bf16", "--output", str(tmp_path / "out.jsonl")]
    bench.main(command)
    bench.main([*command, "--against", str(path)])
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    first, second = (json.loads(line) for line in lines)
    assert [len(first["contenders"]), len(second["contenders"])] == [6, 4]
    assert all(len(c["tokens_per_second"]) == 2 for c in first["contenders"] + second["contenders"])
    assert first["contenders"][2]["name"] == f"{path} --model.depth 1"
    assert first["contenders"][0]["parameters"] == first["contenders"][1]["parameters"]
    out = capsys.readouterr().out
    assert "2 rounds of 1 steps on cpu" in out
    assert "to nanogpt as it runs on cpu (fp32): " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "0"], "--pairs is 0"),
        (["--variants", "bf61"], "did you mean 'bf16'"),
        (["--against", "nanoGPT"], "write nanogpt, or"),
        (["--model.widht", "8"], "did you mean 'model.width'"),
        (["--log.inspect_every", "4"], "--steps is 5: with log.inspect_every 4 write a multiple of it, as 4"),
    ],
)
def test_mistakes_are_named(config: RunConfig, tmp_path: Path, options: list[str], message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump(config))
    with pytest.raises(ConfigError, match=message):
        bench.main([str(path), *options])


def test_a_missing_compiler_is_named_before_anything_is_measured(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured"))
    path = tmp_path / "run.yaml"
    path.write_text(dump(config))
    with pytest.raises(ConfigError, match="needs no-such-compiler, which is not here"):
        bench.main([str(path)])


def test_every_variant_is_known() -> None:
    assert set(VARIANTS.values()) == {(p, c) for p in ("fp32", "bf16") for c in (False, True)}
