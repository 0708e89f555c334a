"""The folder with its own code: the same function as ours, in transformers' ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import ModelConfig, Transformer
from models.config import ResidualConfig
from models.plan import PLANS, SITES
from tests.models.building import VOCABULARY, scrambled, tiny, tokens
from tools.exported import PREFIX, remote_code_files, remote_config
from tools.exported.configuration_equipoise import EquipoiseConfig
from tools.exported.modeling_equipoise import EquipoiseForCausalLM

OTHERS: dict[str, dict[str, Any]] = {
    "gpt-trunk": {"plan": "gpt", "trunk": "gpt", "bias": True},
    "gpt-trunk-dnt": {"plan": "dnt", "trunk": "gpt", "tied": False},
    "gqa": {"plan": "dnt", "kv_heads": 2},
    "one-kv-head": {"plan": "olmo2", "kv_heads": 1, "tied": True},
    "biases": {"plan": "gpt", "bias": True},
    "everywhere": {"plan": "dyt", "sites": {site: {"function": "derf"} for site in SITES}},
    "settings": {
        "plan": "none",
        "embedding_scale": "learned",
        "sites": {
            "embed": {"function": "layernorm", "bias": True},
            "query": "l2norm",
            "key": "l2norm",
            "attn_mid": {"function": "dyt", "beta": True},
            "mlp_mid": {"function": "rmsnorm", "eps": 0.1},
            "final": {"function": "derf", "beta": False},
        },
    },
    "without-gains": {
        "plan": "none",
        "sites": {
            "embed": {"function": "rmsnorm", "gain": False},
            "attn_in": {"function": "layernorm", "gain": False, "bias": True},
            "attn_out": {"function": "layernorm", "gain": False},
            "mlp_in": {"function": "dyt", "gain": False},
            "mlp_mid": {"function": "dyt", "gain": False, "beta": True},
            "final": {"function": "derf", "gain": False},
        },
    },
    "functions": {
        "plan": "none",
        "trunk": "gpt",
        "sites": {
            "attn_in": {"function": "logistic", "alpha": "fixed", "beta": True},
            "value": {"function": "isru", "alpha": 0.7, "gain": False},
            "attn_post": {"function": "softsign", "shift": True},
            "mlp_in": {"function": "dyt", "shift": True, "alpha": 2},
            "mlp_act": {"function": "derf", "shift": False},
            "mlp_post": {"function": "hardtanh", "beta": True, "gain": False},
        },
    },
    "first-blocks": {
        "plan": "mix-ln",
        "depth": 3,
        "first_blocks": 2,
        "first_sites": {"value": "derf", "mlp_mid": {"function": "sigmoid", "alpha": 0.5}, "attn_post": "none"},
    },
    "layerscale": {"plan": "dnt", "residual": ResidualConfig("layerscale")},
    "scaled": {"plan": "dyt", "residual": ResidualConfig("scaled"), "weights": "sigma", "bias": True},
    "gpt-trunk-nf": {"plan": "nf", "trunk": "gpt", "bias": True, "residual": ResidualConfig(constant=0.5)},
}
CASES = {plan: {"plan": plan} for plan in PLANS} | OTHERS


def config_of(case: str) -> ModelConfig:
    return tiny(**CASES[case], rope_theta=500.0)


def write_folder(folder: Path, model: Transformer) -> Path:
    """As the converter does."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(remote_config(model.config)))
    for name, content in remote_code_files(model.config).items():
        (folder / name).write_bytes(content)
    tensors = {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def pair(case: str, folder: Path, **settings: Any) -> tuple[Transformer, EquipoiseForCausalLM]:
    ours = scrambled(config_of(case)).eval()
    theirs, info = EquipoiseForCausalLM.from_pretrained(
        write_folder(folder / "model", ours), output_loading_info=True, **settings
    )
    assert not any(info.values()), f"tensors missing, unexpected or of another shape: {info}"
    return ours, theirs


# fp32 logits of some units; the two compute the same sums, in another order at most
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def assert_same(logits: Tensor, expected: Tensor) -> None:
    """Where nothing norms the stream they may be some hundreds: to 1e-5 of the largest."""
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_ours(case: str, attention: str, tmp_path: Path) -> None:
    ours, theirs = pair(case, tmp_path, attn_implementation=attention)
    assert theirs.config._attn_implementation == attention
    ids = tokens()
    expected = ours(ids)
    assert_same(theirs(ids).logits, expected)
    assert_same(theirs(ids, logits_to_keep=3).logits, expected[:, -3:])
    assert_same(theirs(inputs_embeds=theirs.get_input_embeddings()(ids)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_cache_changes_nothing(case: str, tmp_path: Path) -> None:
    """Token by token the logits of one pass, and greedy generation without a cache."""
    ours, theirs = pair(case, tmp_path)
    ids = tokens()
    expected = ours(ids)
    cache = None
    for begin, end in ((0, 5), *((place, place + 1) for place in range(5, 16))):
        out = theirs(ids[:, begin:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert_same(out.logits, expected[:, begin:end])
    kv_heads = ours.config.key_value_heads
    assert cache.layers[0].keys.shape == (2, kv_heads, 16, 8), "grouped heads are cached once"

    prompt = ids[:, :4]
    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)
    again = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **greedy)
    assert torch.equal(made, again)
    row = prompt
    for _ in range(12):
        row = torch.cat((row, ours(row)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(made, row)


@torch.no_grad()
@pytest.mark.parametrize("case", ["dnt", "dyt", "gpt-trunk", "gqa", "olmo2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_padded_batch_equals_its_prompts(case: str, attention: str, tmp_path: Path) -> None:
    _, theirs = pair(case, tmp_path, attn_implementation=attention)
    prompts = [tokens(batch=1, length=length, seed=length) for length in (3, 7, 5)]
    padded = torch.cat([torch.nn.functional.pad(p, (7 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (7 - p.shape[1], 0)) for p in prompts])
    greedy = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "return_dict_in_generate": True}
    together = theirs.generate(padded, attention_mask=mask, output_scores=True, **greedy)
    for row, prompt in enumerate(prompts):
        alone = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), output_scores=True, **greedy)
        assert torch.equal(together.sequences[row, 7:], alone.sequences[0, prompt.shape[1] :])
        for one, other in zip(together.scores, alone.scores, strict=True):
            torch.testing.assert_close(one[row], other[0], **TOLERANCE)


def test_sampling_is_seeded(tmp_path: Path) -> None:
    _, theirs = pair("dyt", tmp_path)
    prompt = tokens(batch=2, length=3)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "top_p": 0.9, "temperature": 3.0, "max_new_tokens": 12, "pad_token_id": 0}
        return theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_the_loss_is_that_of_the_next_token(tmp_path: Path) -> None:
    ours, theirs = pair("dnt", tmp_path)
    ids = tokens()
    labels = ids.clone()
    labels[0, :6] = -100
    _, nll = ours(ids[:, :-1], labels[:, 1:].contiguous())
    targets = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(theirs(ids, labels=labels).loss, nll / targets, **TOLERANCE)
    # Trainer's way under gradient accumulation: the sum, divided by what it counted
    torch.testing.assert_close(theirs(ids, labels=labels, num_items_in_batch=7).loss, nll / 7, **TOLERANCE)


def gradients(model: EquipoiseForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.mark.parametrize("case", ["mix-ln", "fixup", "nf", "sigma-reparam", "functions", "layerscale", "scaled"])
def test_the_gradients_are_ours(case: str, tmp_path: Path) -> None:
    """Fine-tuning goes where training would. fp32; what is 0 but for rounding is measured by the greatest of all."""
    ours, theirs = pair(case, tmp_path)
    ids = tokens()
    found = gradients(theirs, ids)
    (ours(ids[:, :-1], ids[:, 1:].contiguous())[0] / ids[:, 1:].numel()).backward()
    expected = {PREFIX + name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys() == dict(theirs.named_parameters()).keys()
    greatest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 1e-4 * grad.abs().max() + 1e-7 * greatest, name


@pytest.mark.parametrize("case", ["dnt", "dyt", "gpt-trunk", "gpt-trunk-nf", "sigma-reparam"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_keeps_the_gradients(case: str, reentrant: bool, tmp_path: Path) -> None:
    _, model = pair(case, tmp_path)
    ids = tokens()
    model.train()
    plain = gradients(model, ids)
    assert plain.keys() == dict(model.named_parameters()).keys()
    passes = []
    model.model.blocks[0].feedforward.register_forward_pre_hook(lambda *_: passes.append(1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = gradients(model, ids)
    assert len(passes) == 2, "once forward, once again for the backward"
    torch.testing.assert_close(checkpointed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("case", ["dnt", "dyt", "gpt-trunk"])
def test_three_steps_lower_the_loss(case: str, tmp_path: Path) -> None:
    """transformers' Trainer does the same in test_exported_alone.py."""
    _, model = pair(case, tmp_path)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        out = model(tokens(), labels=tokens())
        assert out.past_key_values is None, "no cache in training"
        losses.append(out.loss.item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_dropout_is_that_of_training_alone(tmp_path: Path) -> None:
    ours = scrambled(tiny(plan="dnt", dropout=0.3)).eval()
    theirs = EquipoiseForCausalLM.from_pretrained(write_folder(tmp_path / "model", ours))
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), **TOLERANCE)
        theirs.train()
        assert not torch.equal(theirs(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_hidden_states_are_the_residual_stream(tmp_path: Path) -> None:
    ours, theirs = pair("dnt", tmp_path)
    seen: list[Tensor] = []
    for module in ours.blocks:
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ours.final.register_forward_hook(lambda _, __, output: seen.append(output))
    ours(tokens())
    states = theirs(tokens(), output_hidden_states=True).hidden_states
    assert theirs(tokens()).hidden_states is None
    torch.testing.assert_close(states, tuple(seen), **TOLERANCE)
    with pytest.raises(ValueError, match="does not return attention weights"):
        theirs(tokens(), output_attentions=True)


@torch.no_grad()
@pytest.mark.parametrize("case", ["dnt", "derf", "gpt-trunk", "without-gains", "nf", "sigma-reparam", "scaled"])
def test_half_precision_keeps_norms_in_fp32(case: str, tmp_path: Path) -> None:
    """As our training does under autocast, to which the logits are compared: bf16 has 8 bits."""
    ours, theirs = pair(case, tmp_path, dtype=torch.bfloat16)
    for name, parameter in theirs.named_parameters():
        kept = name.split(".")[-2] in {*SITES, "residual"} or name.endswith(("embedding_scale", ".gain"))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    with torch.autocast("cpu", torch.bfloat16):
        expected = ours(tokens())
    got = theirs(tokens()).logits
    assert got.dtype == torch.bfloat16
    scale = expected.float().std()
    assert (got.float() - expected.float()).abs().max() < 0.1 * scale
    # nothing in the way of a model that is bf16 throughout
    assert (theirs.to(torch.bfloat16)(tokens()).logits.float() - expected.float()).abs().max() < 0.3 * scale


@pytest.mark.parametrize("case", ["dyt", "one-kv-head", "gpt-trunk", "without-gains", "first-blocks", "scaled", "nf"])
def test_saved_is_what_was_loaded(case: str, tmp_path: Path) -> None:
    ours, theirs = pair(case, tmp_path)
    theirs.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    expected = {PREFIX + name: tensor for name, tensor in ours.state_dict().items()}
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in expected)
    again = EquipoiseForCausalLM.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize(
    ("case", "scale"),
    {
        "derf": None,
        "without-gains": None,
        "nf": 0.0,
        "rezero": 0.0,
        "fixup": 1.0,
        "layerscale": 0.1,
        "scaled": None,
    }.items(),
)
@pytest.mark.parametrize("missing", [False, True])
def test_a_new_model_starts_as_it_should(case: str, scale: float | None, missing: bool, tmp_path: Path) -> None:
    """As do the tensors that a checkpoint lacks, here all but one."""
    config = EquipoiseConfig(**remote_config(tiny(**CASES[case] | {"bias": True})))
    model = EquipoiseForCausalLM(config)
    if missing:
        config.save_pretrained(tmp_path)
        save_file({"model.head.weight": model.model.head.weight}, tmp_path / "model.safetensors", {"format": "pt"})
        model = EquipoiseForCausalLM.from_pretrained(tmp_path)
    for name, parameter in model.state_dict().items():
        leaf = name.split(".")[-1]
        if name.split(".")[-2] in SITES:
            assert parameter.unique().tolist() == [1.0 if leaf in ("weight", "alpha") else 0.0], name
        elif name.split(".")[-2] == "residual":
            assert scale is not None
            assert torch.equal(parameter, torch.full_like(parameter, scale)), name
        elif leaf in ("bias", "gain"):
            assert (parameter == float(leaf == "gain")).all(), name
        elif leaf == "embedding_scale":
            assert parameter.item() == pytest.approx(32**0.5)
        else:
            assert parameter.std() == pytest.approx(0.02, rel=0.2), name


@pytest.mark.parametrize("case", ["dnt", "one-kv-head"])
def test_the_vocabulary_can_grow(case: str, tmp_path: Path) -> None:
    _, model = pair(case, tmp_path)
    with torch.no_grad():
        before = model(tokens()).logits
        model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
        after = model(tokens()).logits
    assert after.shape[-1] == VOCABULARY + 3
    torch.testing.assert_close(after[..., :VOCABULARY], before, **TOLERANCE)
