"""What the benchmark compares is what it says: our real step, GPT-2, and other people's LLaMA of the same sizes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import ModelConfig, parameter_roles
from models.errors import ConfigError
from pretrain.config import LogConfig, RunConfig
from tests.models.building import scrambled
from tests.tools.small_run import WORLD, prepare_small, small_config, train_small
from tools.benching import huggingface
from tools.benching.contenders import VARIANTS, Contender, in_variant, like, lineup, peer
from tools.benching.llamas import LLAMAS, huggingface_settings, llama_sizes
from tools.benching.loop import Loop, Windows
from tools.benching.nanogpt import NanoGPT, optimizer
from tools.benching.ours import OurSteps, draw_weights
from tools.formats.names import llama_name

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("bench")
    config = small_config(folder, prepare_small(folder))
    return replace(config, model=replace(config.model, vocab_size=300))


def test_graphs_are_of_compiled_variants(config: RunConfig) -> None:
    replayed = replace(config, train=replace(config.train, compile=True, cuda_graphs=True))
    assert not in_variant(replayed, "fp32").train.cuda_graphs
    assert in_variant(replayed, "bf16+compile").train.cuda_graphs


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


@pytest.mark.parametrize("plan", ["dyt", "rezero"])
def test_weights_that_a_gpu_draws_can_be_trained(config: RunConfig, plan: str) -> None:
    steps = OurSteps(replace(config, model=replace(config.model, plan=plan)), WORLD)
    for parameter in steps.engine.model.parameters():
        parameter.data.fill_(torch.nan)
    draw_weights(steps.engine.model)
    alphas = [role for role in parameter_roles(steps.engine.model).values() if role == "alpha"]
    assert len(alphas) == (5 if plan == "dyt" else 0)
    for _ in range(2):
        steps.step()
    steps.close()
    assert all(parameter.isfinite().all() for parameter in steps.engine.model.parameters())


def test_nanogpt_is_gpt2() -> None:
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


def test_the_peers_loop_learns_the_text(tmp_path: Path) -> None:
    tokens = np.tile(np.arange(10, dtype="<u2"), 50)
    tokens.tofile(tmp_path / "train.bin")
    torch.manual_seed(0)
    model = NanoGPT(vocabulary=10, width=32, depth=1, heads=2, length=8)
    windows = Windows(tmp_path / "train.bin", "<u2", 8, 4, CPU)
    loop = Loop(model, model, optimizer(model, CPU), windows, CPU, accumulation=2, bf16=False)
    for _ in range(120):
        loop.step()
    text = torch.arange(9)[None] % 10
    assert model(text[:, :-1], text[:, 1:]).item() < 1.0  # ln 10 = 2.3 before
    assert loop.waited > 0


@pytest.mark.parametrize("tied", [False, True])
def test_huggingface_has_our_llama_s_loss_at_equal_weights(tied: bool) -> None:
    sizes = ModelConfig(
        plan="llama", width=32, depth=2, heads=4, kv_heads=2, ffn_width=48, vocab_size=60, context=16, tied=tied
    )
    ours = scrambled(sizes, seed=3)
    theirs, loss = huggingface.build(huggingface_settings(sizes), CPU, compiled=False)
    state = {llama_name(name): tensor for name, tensor in ours.state_dict().items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    rows = torch.randint(0, 60, (3, 17), generator=torch.Generator().manual_seed(0))
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    mean = ours(inputs, targets)[1] / 48
    torch.testing.assert_close(loss(inputs, targets), mean, rtol=1e-5, atol=0)  # fp32, other sums


@pytest.mark.parametrize(("name", "depth"), [("nanogpt", 1), ("nanogpt", 3), ("hf", 2)])
def test_a_peer_s_model_on_our_stack_has_its_parameters(config: RunConfig, name: str, depth: int) -> None:
    config = replace(config, model=replace(config.model, depth=depth, plan="dnt", ffn_width=100, kv_heads=1))
    reference = peer(config, WORLD, name)
    steps = OurSteps(like(config, reference.family), WORLD)
    steps.close()
    shapes = [tuple(p.shape) for p in steps.engine.model.parameters()]
    assert reference.parameters == sum(p.numel() for p in steps.engine.model.parameters())
    assert shapes.count((32,)) == 2 * depth + 1  # norms without biases
    # nanoGPT has four widths whatever the configuration's feed-forward; a LLaMA has a gate and an up of that width
    assert (shapes.count((128, 32)), shapes.count((100, 32))) == ((depth, 0) if name == "nanogpt" else (0, 2 * depth))


def test_peers_and_we_count_the_same_operations(config: RunConfig) -> None:
    """6 N + 12 depth width length: here N is 2 (4 32^2 + 3 32 100) + 300 32 and the second term 24,576."""
    config = replace(config, model=llama_sizes(replace(config.model, ffn_width=100), 32))
    found = close(list(lineup([("mine", config)], [("hf", None)], [], WORLD)))
    matmul = 2 * (4 * 32**2 + 3 * 32 * 100) + 300 * 32
    assert [c.flops for c in found] == [6 * matmul + 12 * 2 * 32 * 32] * 3
    assert len({c.parameters for c in found}) == 1


def close(contenders: Sequence[Contender]) -> Sequence[Contender]:
    for contender in contenders:
        contender.steps.close()
    return contenders


def test_who_takes_part(config: RunConfig) -> None:
    """Twins where the model or the optimizer is not our own already, references first, all in every variant."""
    others: list[tuple[str, RunConfig | None]] = [("nanogpt", None), ("hf", None)]
    found = close(list(lineup([("mine", config)], others, ["bf16", "fp32"], WORLD)))
    once = [("nanogpt", "reference"), ("our gpt", "twin"), ("hf", "reference"), ("our llama", "twin"), ("mine", "own")]
    assert [(c.name, c.role) for c in found] == 2 * once
    assert [c.variant for c in found] == ["bf16"] * 5 + ["fp32"] * 5
    assert {c.tokens for c in found} == {128}
    same = like(config, "llama")
    found = close(list(lineup([("mine", same), ("dnt", config)], others[1:], [], WORLD)))
    assert [(c.name, c.variant) for c in found] == [("hf", "fp32"), ("mine", "fp32"), ("dnt", "fp32")]
    shallow = replace(config, model=replace(config.model, depth=1))
    found = close(list(lineup([("mine", config)], [("other", shallow)], [], WORLD)))
    assert [(c.name, c.role) for c in found] == [("other", "reference"), ("mine", "own")]
    assert found[0].parameters < found[1].parameters


def test_what_is_not_installed_or_cannot_run_is_one_line(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "litgpt.config", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"^--against litgpt: .*: pip install --no-deps litgpt [^\n]*$"):
        peer(config, WORLD, "litgpt")
    with pytest.raises(ConfigError, match=r"^--against hf: .*: pip install transformers$"):
        peer(config, WORLD, "hf")
    with pytest.raises(ConfigError, match=r"^--against torchtitan: its attention[^\n]* has no backward on a CPU"):
        LLAMAS["torchtitan"](llama_sizes(config.model, 32), CPU, False)
    with pytest.raises(ConfigError, match=r"data\.source is stream, which nanogpt cannot read"):
        peer(replace(config, data=replace(config.data, source="stream")), WORLD, "nanogpt")


def test_every_variant_is_known() -> None:
    assert set(VARIANTS.values()) == {(p, c) for p in ("fp32", "bf16") for c in (False, True)}
