"""Rounded models: which weight is rounded, that nothing else is, and that all of it is undone; losses and signals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelConfig, Transformer
from models.weights import SigmaLinear, StandardizedLinear, leading_vectors
from pretrain.config import DataConfig, RunConfig, TrainConfig
from tools.loading import TrainedRun
from tools.quantizing.formats import FORMATS, Treatment, fake_quantize
from tools.quantizing.linears import effective_weight, linears, place, rounded
from tools.quantizing.losses import window_losses
from tools.quantizing.measuring import ALL, parts
from tools.quantizing.signals import decibels, input_signals, weight_signals

HARSH = Treatment("int4", activations=True, per_row=False)
WEIGHTS = Treatment("int4", activations=False, per_row=True)


def build(**settings: Any) -> Transformer:
    torch.manual_seed(0)
    given: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "context": 16, "vocab_size": 60} | settings
    model = Transformer(ModelConfig(**given)).eval()
    for parameter in model.parameters():  # no zeros, no ones
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


class Eos:
    eos = 0


def as_run(model: Transformer, **data: Any) -> TrainedRun:
    data_config = DataConfig(sequence_length=16, **data)
    config = RunConfig(model=model.config, data=data_config, train=TrainConfig(steps=1, batch_tokens=16))
    return TrainedRun(model, config, Eos(), 1)  # type: ignore[arg-type]


def text(seed: int = 0, windows: int = 3) -> tuple[Any, Any]:
    tokens = torch.randint(0, 60, (windows, 17), generator=torch.Generator().manual_seed(seed)).numpy()
    return tokens[:, :-1], tokens[:, 1:]


TOKENS = torch.from_numpy(text()[0])


def nothing() -> None:
    pass


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, StandardizedLinear, SigmaLinear])
def test_the_effective_weight_is_what_multiplies(kind: type[nn.Linear], bias: bool) -> None:
    torch.manual_seed(0)
    linear = kind(24, 40, bias=bias)
    x = torch.randn(7, 24)
    weight = effective_weight(linear)
    # sums of 24 products in another order
    torch.testing.assert_close(F.linear(x, weight, linear.bias), linear(x), rtol=1e-5, atol=1e-6)


def test_effective_weights_by_their_formulas() -> None:
    torch.manual_seed(0)
    sigma, standardized = SigmaLinear(24, 40, bias=True), StandardizedLinear(24, 40, bias=False, gamma=1.7)
    sigma.gain.data.fill_(0.7)
    u, v = leading_vectors(sigma.weight.detach())
    torch.testing.assert_close(effective_weight(sigma), sigma.weight.detach() * 0.7 / (u @ sigma.weight.detach() @ v))
    weight = effective_weight(standardized)
    torch.testing.assert_close(weight.mean(1), torch.zeros(40), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight.norm(dim=1), torch.full((40,), 1.7))


@pytest.mark.parametrize("plan", ["llama", "dyt", "dnt", "nf", "sigma-reparam"])
def test_rounding_nothing_changes_nothing(plan: str) -> None:
    model = build(plan=plan)
    before = model(TOKENS)
    with rounded(model, {}):
        assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("plan", ["dyt", "sigma-reparam", "post"])
def test_a_model_is_its_own_afterwards(plan: str, tied: bool) -> None:
    model = build(plan=plan, tied=tied)
    before, state, names = model(TOKENS), {**model.state_dict()}, [name for name, _ in model.named_modules()]
    modules = [id(module) for module in model.modules()]

    def fail() -> None:
        with rounded(model, dict.fromkeys([*linears(model), "head"], HARSH)):
            assert not torch.equal(model(TOKENS), before)
            raise RuntimeError("in the midst of it")

    with pytest.raises(RuntimeError, match="midst"):
        fail()
    assert torch.equal(model(TOKENS), before)
    assert [name for name, _ in model.named_modules()] == names
    assert [id(module) for module in model.modules()] == modules
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("trunk", ["llama", "gpt"])
def test_rounded_weights_are_those_of_a_model_that_holds_them(trunk: str) -> None:
    """The reference writes the rounded weights into the parameters."""
    model, reference = build(trunk=trunk), build(trunk=trunk)
    treated = [name for name in linears(model) if place(name) in ((0, "q"), (1, "down"), (1, "up"))]
    assert len(treated) == 3
    for name in treated:
        weight = linears(reference)[name].weight
        weight.data = fake_quantize(weight.data, FORMATS["int4"], per_row=True)
    with rounded(model, dict.fromkeys(treated, WEIGHTS)):
        assert torch.equal(model(TOKENS), reference(TOKENS))


def test_the_weight_that_multiplies_is_rounded_not_its_parameters() -> None:
    model = build(plan="sigma-reparam")
    name = "blocks.0.attention.v"
    linear = linears(model)[name]
    assert isinstance(linear, SigmaLinear)
    weight = linear.weight.detach()
    u, v = leading_vectors(weight)
    x = torch.randn(1, 5, 32)
    wanted = F.linear(x, WEIGHTS.round(weight * (linear.gain.detach() / (u @ (weight @ v)))), linear.bias)
    with rounded(model, {name: WEIGHTS}):
        torch.testing.assert_close(model.get_submodule(name)(x), wanted)


def test_activations_are_those_that_the_linear_reads() -> None:
    model = build(plan="llama")
    name = "blocks.1.feedforward.down"
    linear = linears(model)[name]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        seen.append((given[0], output))

    linear.register_forward_hook(keep)
    model(TOKENS)
    with rounded(model, {name: HARSH}):
        got: list[Tensor] = []
        model.get_submodule(name).register_forward_hook(lambda *call: got.append(call[2]))
        model(TOKENS)
    x, exact = seen[0]
    low = [fake_quantize(tensor, FORMATS["int4"], per_row=False) for tensor in (x, linear.weight)]
    torch.testing.assert_close(got[0], low[0] @ low[1].T)
    assert not torch.allclose(got[0], exact, rtol=1e-3)


@pytest.mark.parametrize(("plan", "tied"), [("dyt", True), ("dyt", False), ("post", True)])
def test_the_head_is_rounded_and_the_embedding_is_not(plan: str, tied: bool) -> None:
    model = build(plan=plan, tied=tied)
    hidden: list[Tensor] = []
    last = model.blocks[-1] if model.final is None else model.final
    handle = last.register_forward_hook(lambda *call: hidden.append(call[2]))
    model(TOKENS)
    handle.remove()
    weight = model.embedding.weight if model.head is None else model.head.weight
    wanted = HARSH.round(hidden[0]) @ HARSH.round(weight).T
    with rounded(model, {"head": HARSH}):
        torch.testing.assert_close(model(TOKENS), wanted)


@pytest.mark.parametrize("mask", [False, True])
def test_losses_are_the_means_of_windows(mask: bool) -> None:
    model = build(plan="dyt")
    inputs, targets = text(windows=4)
    inputs[:, 5] = 0  # a document ends
    calls: list[None] = []
    got = window_losses(as_run(model, document_mask=mask), (inputs, targets), lambda: calls.append(None))
    for row in range(4):
        tokens = torch.from_numpy(inputs[row : row + 1])
        ends = tokens.eq(0).cumsum(1) - tokens.eq(0).long()
        logits = model(tokens, documents=ends if mask else None)
        wanted = F.cross_entropy(logits[0], torch.from_numpy(targets[row]))
        assert got[row] == pytest.approx(wanted.item(), rel=1e-5)
    assert len(calls) == 4


def test_parts_cover_every_linear_four_times() -> None:
    names = list(linears(build(depth=3)))
    found = parts(names)
    assert len(found) == 3 * 7 + 3 + 7 + 1
    assert sorted(found[ALL, ALL]) == sorted(names)
    assert found[1, ALL] == [name for name in names if name.startswith("blocks.1.")]
    assert found[ALL, "down"] == [f"blocks.{block}.feedforward.down" for block in range(3)]
    assert found[2, "q"] == ["blocks.2.attention.q"]
    assert sum(map(len, found.values())) == 4 * len(names)


def test_decibels_by_hand() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20)
    assert decibels(1.0, 0.0) == math.inf
    assert math.isnan(decibels(0.0, 0.0))


def test_uniform_weights_in_int8_keep_48_decibels() -> None:
    """Signal 1/3, noise step^2 / 12 with a step of 1/127 (Bennett 1948): 10 log10(4 * 127^2) = 48.1 dB."""
    model = build(width=256, heads=4, depth=1)
    for linear in linears(model).values():
        nn.init.uniform_(linear.weight, -1, 1)
    for name, largest in (("int8", 127), ("int4", 7)):
        for one in weight_signals(as_run(model), name):
            # 65,536 weights and more: the noise's power is right to 1 %, 0.05 dB; int4 rows have a largest below 1
            assert one.ratio.per_tensor == pytest.approx(10 * math.log10(4 * largest**2), abs=0.2), one
            assert one.ratio.per_row == pytest.approx(one.ratio.per_tensor, abs=0.3), one


def test_signal_to_noise_by_hand_per_tensor_and_per_row() -> None:
    """Row 0 becomes 0 and -1 by the tensor's step of 1; by its own step of 0.1 it loses nothing."""
    model = build(width=8, heads=2, depth=1)
    linear = linears(model)["blocks.0.attention.q"]
    linear.weight.data.zero_()
    linear.weight.data[0, :2] = torch.tensor([0.4, -0.7])
    linear.weight.data[1, :2] = torch.tensor([7.0, 2.25])
    found = weight_signals(as_run(model), "int4")[0]
    assert (found.block, found.kind) == (0, "q")
    signal = 0.4**2 + 0.7**2 + 7**2 + 2.25**2
    assert found.ratio.per_tensor == pytest.approx(10 * math.log10(signal / (0.4**2 + 0.3**2 + 0.25**2)), abs=1e-4)
    assert found.ratio.per_row == pytest.approx(10 * math.log10(signal / 0.25**2), abs=1e-4)


def test_an_outlier_feature_shows_in_the_inputs_that_have_it() -> None:
    model = build(plan="llama")
    clean = {(one.block, one.kinds): one for one in input_signals(as_run(model), text(), "int8", nothing)}
    assert list(clean) == [(block, kinds) for block in (0, 1) for kinds in ("q, k, v", "out", "gate, up", "down")]
    norm = model.get_submodule("blocks.1.attn_in")
    assert isinstance(norm.weight, Tensor)
    norm.weight.data[3] *= 200
    hurt = {(one.block, one.kinds): one for one in input_signals(as_run(model), text(), "int8", nothing)}
    before, after = clean[1, "q, k, v"], hurt[1, "q, k, v"]
    assert (before.over, after.over) == (0, 1)
    assert after.kurtosis > 5 * before.kurtosis
    assert after.largest > 20 * before.largest
    assert hurt[0, "down"] == clean[0, "down"]  # blocks before do not see it
    # fp8 keeps what it had, to a decibel or so: its error is relative
    fp8 = {(one.block, one.kinds): one for one in input_signals(as_run(model), text(), "fp8", nothing)}
    assert fp8[1, "q, k, v"].ratio.per_row > 28


def test_a_bounded_input_has_no_outliers() -> None:
    """DyT's output is at most its gain, however large the stream is; RMSNorm's largest is sqrt(width) gains."""
    streams = {}
    for plan in ("llama", "dyt"):
        model = build(plan=plan, width=64, depth=1)
        norm = model.get_submodule("blocks.0.attn_in")
        assert isinstance(norm.weight, Tensor)
        norm.weight.data.fill_(1.0)
        if plan == "dyt":
            assert isinstance(norm.alpha, Tensor)
            norm.alpha.data.fill_(0.5)
        model.embedding.weight.data.normal_()
        model.embedding.weight.data[:, 7] *= 100
        if model.embedding_scale is not None:
            model.embedding_scale.data.fill_(1.0)
        streams[plan] = input_signals(as_run(model), text(), "int8", nothing)[0]
    assert streams["llama"].largest > 20 > streams["dyt"].largest
    assert streams["dyt"].over == 0 < streams["llama"].over
    assert streams["dyt"].ratio.per_tensor > 40


def test_a_trunk_without_a_gate_says_so() -> None:
    found = input_signals(as_run(build(trunk="gpt", plan="gpt")), text(), "int8", nothing)
    assert [one.kinds for one in found if one.block == 0] == ["q, k, v", "out", "up", "down"]
