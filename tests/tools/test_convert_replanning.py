"""A model given the norms of another plan: what is carried over, what starts anew, and that it trains on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ConfigError, Transformer
from models.loss import IGNORE
from pretrain.cli import load as load_config
from pretrain.data import Tokenizer, austen
from pretrain.data.prepared import PreparedSource
from pretrain.trainer import Outcome, Trainer
from tests.models.building import tiny
from tests.runs import metrics, pretrain, write_config
from tests.tools.converting import assert_bitwise, model_of, run_convert, tensors_of, write_run
from tests.tools.small_run import WORLD
from tools.formats.source import read
from tools.loading import load_run

LENGTH = 32
SIZES = {"vocab_size": 512, "context": LENGTH}
LLAMA = {"plan": "llama", **SIZES}
GPT = {"plan": "gpt", "trunk": "gpt", "bias": True, **SIZES}
SITES = ["blocks.0.attn_in", "blocks.0.mlp_in", "blocks.1.attn_in", "blocks.1.mlp_in", "final"]


def written(folder: Path, corpus: Path, **shape: Any) -> Transformer:
    return write_run(folder, tiny(**shape), tokenizer=(corpus / "tokenizer.model").read_bytes())


def loaded(run: Path) -> Transformer:
    return load_run(run, torch.device("cpu")).model


def calibration_rows(corpus: Path) -> Tensor:
    """What a run reads first: the first eight sequences of its first batch."""
    return torch.from_numpy(PreparedSource(corpus, LENGTH, seed=0).read(range(8)))


def inputs_of(model: nn.Module, sites: list[str], tokens: Tensor) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for site in sites:
        model.get_submodule(site).register_forward_pre_hook(lambda _, x, site=site: seen.update({site: x[0]}))
    with torch.no_grad():
        model(tokens)
    return seen


CASES: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    # the model, the plan, what a site has beside its gain and alpha
    "llama to dyt": (LLAMA, "dyt", set()),
    "llama to derf": (LLAMA, "derf", {"bias", "shift"}),
    "gpt to dyt": (GPT, "dyt", set()),
    "gpt to derf": (GPT, "derf", {"shift"}),
    "gpt without shifts to dyt": (GPT | {"bias": False}, "dyt", set()),
}


@pytest.mark.parametrize(("shape", "plan", "zeros"), CASES.values(), ids=CASES)
def test_what_the_model_has_learned_is_carried_over(
    shape: dict[str, Any], plan: str, zeros: set[str], corpus: Path, tmp_path: Path
) -> None:
    """Every tensor of the source, to the last bit; beside them alphas, an embedding scale of 1, and shifts of 0."""
    source = written(tmp_path / "run", corpus, **shape).state_dict()
    made = model_of(
        run_convert(tmp_path / "run", tmp_path / "new", "native", "--plan", plan, "--data.path", str(corpus))
    )
    assert_bitwise({name: made[name] for name in source}, source)
    new = made.keys() - source.keys()
    added = {"alpha", *zeros}
    assert new == {"embedding_scale", *(f"{site}.{part}" for site in SITES for part in added)}
    assert made["embedding_scale"].tolist() == [1.0]
    for name in new:
        if name.endswith((".bias", ".shift")):
            assert not made[name].any(), name
    assert shape.get("bias") is not True or {f"{site}.bias" for site in SITES} <= source.keys()


@pytest.mark.parametrize("target", [1.0, 0.5])
def test_alpha_is_target_over_standard_deviation(target: float, corpus: Path, tmp_path: Path) -> None:
    """Of what reaches the site when those before it have theirs: hooks on the finished model see it so. 1e-6: the same
    sums in the same order, but for one division."""
    written(tmp_path / "run", corpus, **LLAMA)
    options = ["--alpha", "measured", "--data.path", str(corpus), "--model.alpha.target", str(target)]
    model = loaded(run_convert(tmp_path / "run", tmp_path / "new", "native", "--plan", "dyt", *options))
    seen = inputs_of(model, SITES, calibration_rows(corpus)[:, :-1])
    for site, x in seen.items():
        alpha = model.get_parameter(f"{site}.alpha").item()
        assert alpha == pytest.approx(target / x.double().std().item(), rel=1e-6), site
    assert len({round(x.std().item(), 3) for x in seen.values()}) == len(SITES)  # no two sites could be swapped


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [("0.7", {"attn_in": 0.7, "mlp_in": 0.7, "final": 0.7}), ("role", {"attn_in": 0.9, "mlp_in": 0.2, "final": 0.2})],
)
def test_alpha_by_another_rule(alpha: str, expected: dict[str, float], corpus: Path, tmp_path: Path) -> None:
    written(tmp_path / "run", corpus, **LLAMA)
    options = ["--alpha", alpha, "--model.alpha.attention", "0.9", "--data.path", str(corpus)]
    made = model_of(run_convert(tmp_path / "run", tmp_path / "new", "native", "--plan", "dyt", *options))
    assert {site: made[f"{site}.alpha"].item() for site in SITES} == {
        site: pytest.approx(expected[site.split(".")[-1]]) for site in SITES
    }


class ByHand(nn.Module):
    """``gain * f(alpha * x) + shift``, written once more."""

    def __init__(self, function: Any, gain: Tensor, alpha: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.function, self.gain, self.alpha_, self.shift = function, gain, alpha, shift

    def forward(self, x: Tensor) -> Tensor:
        y = self.gain * self.function(self.alpha_ * x)
        return y if self.shift is None else y + self.shift


@pytest.mark.parametrize(("shape", "plan"), [(LLAMA, "dyt"), (LLAMA, "derf"), (GPT, "dyt")])
@torch.no_grad()
def test_it_is_the_source_with_another_function_at_its_sites(
    shape: dict[str, Any], plan: str, corpus: Path, tmp_path: Path
) -> None:
    """Nothing else moves: the source's own modules, with the norms exchanged by hand, compute the same, and the loss
    told is theirs on the windows of the validation split."""
    source = written(tmp_path / "run", corpus, **shape)
    run = run_convert(tmp_path / "run", tmp_path / "new", "native", "--plan", plan, "--data.path", str(corpus))
    made = model_of(run)
    for site in SITES:
        norm: Any = source.get_submodule(site)
        function = torch.tanh if plan == "dyt" else torch.erf
        exchanged = ByHand(function, norm.weight, made[f"{site}.alpha"], getattr(norm, "bias", None))
        source.set_submodule(site, exchanged)
    tokens = calibration_rows(corpus)[:, :-1]
    torch.testing.assert_close(loaded(run)(tokens), source(tokens), atol=1e-5, rtol=1e-5)


def test_the_losses_are_told(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before and after, each by hand on 256 windows spread evenly over the validation split, to the digits printed."""
    source = written(tmp_path / "run", corpus, **LLAMA)
    new = run_convert(tmp_path / "run", tmp_path / "new", "native", "--plan", "dyt", "--data.path", str(corpus))
    said = capsys.readouterr().out
    found = re.search(r"loss on ([\d,]+) tokens of \S+, validation: ([\d.]+) nats a token before, ([\d.]+) now", said)
    assert found, said
    split = PreparedSource(corpus, LENGTH, seed=0).validation
    assert split is not None
    inputs, targets = (torch.from_numpy(part) for part in split.read([i * split.count // 256 for i in range(256)]))
    assert int(found[1].replace(",", "")) == int(targets.ne(IGNORE).sum())
    for model, told in ((source, found[2]), (loaded(new), found[3])):
        with torch.no_grad():
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        assert loss.item() == pytest.approx(float(told), abs=1e-4)
    assert float(found[2]) != float(found[3])


def test_the_model_can_keep_its_plan(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the control of a comparison: the same weights, at step 0, with a fresh optimizer."""
    source = written(tmp_path / "run", corpus, **LLAMA)
    same = run_convert(tmp_path / "run", tmp_path / "same", "native", "--plan", "llama", "--data.path", str(corpus))
    assert_bitwise(model_of(same), source.state_dict())
    losses = re.search(r"([\d.]+) nats a token before, ([\d.]+) now", capsys.readouterr().out)
    assert losses
    assert losses[1] == losses[2]
    (checkpoint,) = (same / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000000"
    assert any(name.startswith("optimizer.") for name in tensors_of(same))


def test_sites_that_are_new_start_at_gain_one(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And any plan's sites can have any functions: DyT at those of DNT."""
    source = written(tmp_path / "run", corpus, plan="dnt", **SIZES).state_dict()
    sites = ["embed", "attn_in", "query", "key", "attn_out", "mlp_in", "mlp_out", "final"]
    options = ["--model.sites", json.dumps(dict.fromkeys(sites, "dyt")), "--data.path", str(corpus)]
    made = model_of(run_convert(tmp_path / "run", tmp_path / "new", "native", "--plan", "dnt", *options))
    assert_bitwise({name: made[name] for name in source}, source)
    new = {name: value for name, value in made.items() if name not in source and not name.endswith(".alpha")}
    assert new.keys() == {f"blocks.{i}.mlp_in.weight" for i in range(2)}
    assert all(value.eq(1).all() for value in new.values())
    assert "new at mlp_in: gain 1" in capsys.readouterr().out


@torch.no_grad()
def test_a_novel_serves_where_no_text_is_known(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an imported model, with any target; 1e-6 as above."""
    written(tmp_path / "run", corpus, **LLAMA)
    run_convert(tmp_path / "run", tmp_path / "hf", "hf")
    for name in ("config.yaml", "equipoise.json"):
        (tmp_path / "hf" / name).unlink()
    new = run_convert(tmp_path / "hf", tmp_path / "new", "hf", "--plan", "dyt", "--verify")
    said = capsys.readouterr().out
    assert "8 x 32 tokens of Persuasion" in said
    assert "maximal absolute difference" in said
    run_convert(new, tmp_path / "back", "native")
    model = loaded(tmp_path / "back")
    ids = Tokenizer(corpus / "tokenizer.model").encode(austen.novels()["Persuasion"][:20_000])[: 8 * (LENGTH + 1)]
    seen = inputs_of(model, SITES, torch.tensor(ids).view(8, LENGTH + 1)[:, :-1])
    for site, x in seen.items():
        assert model.get_parameter(f"{site}.alpha").item() == pytest.approx(1 / x.double().std().item(), rel=1e-6), site


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a llama run of 150 steps."""
    folder = tmp_path_factory.mktemp("trained")
    shape = {"plan": "llama", "width": 32, "depth": 2, "heads": 2, "context": LENGTH}
    settings = {"name": "first", "model": shape, "optimizer": {"name": "adamw", "lr": 0.01}, "train": {"steps": 150}}
    trainer = Trainer(load_config(write_config(folder, corpus, settings)), WORLD)
    assert trainer.run() is Outcome.FINISHED
    return trainer.folder.path


def test_training_goes_on_with_the_new_norms(trained: Path, corpus: Path, tmp_path: Path) -> None:
    """In a run of its own, from the alphas that were measured, and better after 20 steps than at its start. What the
    model knew is still there: with the same steps from random weights it is worse."""
    steps = ["--train.steps", "20", "--optimizer.lr", "3e-3", "--seed", "1"]
    new = run_convert(trained, tmp_path / "new", "native", "--plan", "dyt", *steps, "--data.path", str(corpus))
    start = model_of(new)
    done = pretrain(new / "config.yaml")
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in metrics(new) if "loss" in record]
    assert len(losses) == 20
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.1
    moved = {name: loaded(new).get_parameter(name) for name in start if name.endswith(".alpha")}
    assert all(value.item() == pytest.approx(start[name].item(), rel=0.2) for name, value in moved.items())
    scratch = pretrain(new / "config.yaml", "--name", "scratch")
    assert scratch.returncode == 0, scratch.stderr
    last = [record["loss"] for record in metrics(tmp_path / "scratch") if "loss" in record][-3:]
    assert sum(losses[-3:]) < sum(last) - 0.3


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "a site is lost": (
        {"plan": "dnt"},
        ["--plan", "dyt"],
        r"has nothing at embed, where the model has rmsnorm: choose",
    ),
    "shifts are lost": (
        GPT,
        ["--plan", "llama"],
        r"no place for blocks.0.attn_in.bias and 4 more: choose another plan",
    ),
    "a scale is lost": (
        {"plan": "dyt"},
        ["--plan", "llama"],
        "lacks embedding_scale: write --model.embedding_scale learned",
    ),
    "norms of heads": (
        {"plan": "dnt"},
        ["--plan", "olmo2", "--model.sites", "{embed: rmsnorm, attn_in: rmsnorm}"],
        "changes more than functions: qk_scope is head in the model and projection in the plan",
    ),
    "another residual": (LLAMA, ["--plan", "fixup"], "residual is plain in the model and fixup in the plan"),
    "a site of a block": (LLAMA, ["--plan", "mix-ln"], r"has nothing at blocks.0.attn_in, where the model has rmsnorm"),
    "no such plan": (LLAMA, ["--plan", "dit"], "no plan is called 'dit'; did you mean 'dyt'"),
    "no such function": (LLAMA, ["--plan", "dyt", "--model.sites", "{final: dit}"], "no function is called 'dit'"),
    "no alpha": (LLAMA, ["--plan", "llama", "--alpha", "measured"], "no site of plan 'llama' has one"),
    "alpha of zero": (LLAMA, ["--plan", "dyt", "--alpha", "0"], "--alpha is '0': write measured, role, width or a"),
    "alpha of nothing": (LLAMA, ["--plan", "dyt", "--alpha", "mesured"], "--alpha is 'mesured'"),
    "target of zero": (LLAMA, ["--plan", "dyt", "--model.alpha.target", "0"], "model.alpha.target is 0"),
    "a rule twice": (LLAMA, ["--plan", "dyt", "--model.alpha.rule", "role"], "--model.alpha.rule .* write --alpha"),
    "another width": (LLAMA, ["--plan", "dyt", "--model.width", "64"], "--model.width does not go with --plan"),
    "alpha alone": (LLAMA, ["--alpha", "measured"], "write --plan dyt too"),
    "optimizer state": (LLAMA, ["--plan", "dyt", "--optimizer"], "leave --optimizer out"),
    "folding too": (LLAMA, ["--plan", "dyt", "--fold-gains"], "convert once with each"),
}


@pytest.mark.parametrize(("shape", "options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(shape: dict[str, Any], options: list[str], message: str, corpus: Path, tmp_path: Path) -> None:
    """In one line, and nothing is left behind."""
    written(tmp_path / "run", corpus, **{**SIZES, **shape})
    with pytest.raises(ConfigError, match=message) as refused:
        run_convert(tmp_path / "run", tmp_path / "new", "native", *options, "--data.path", str(corpus))
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_text_is_needed(corpus: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny(**LLAMA))
    run_convert(tmp_path / "run", tmp_path / "hf", "hf")
    for name in ("config.yaml", "equipoise.json"):
        (tmp_path / "hf" / name).unlink()
    with pytest.raises(ConfigError, match=r"the model has no tokenizer .* --data.path PREPARED"):
        run_convert(tmp_path / "hf", tmp_path / "new", "native", "--plan", "dyt")
    with pytest.raises(ConfigError, match="holds no prepared data"):  # of a run whose text is gone
        run_convert(tmp_path / "run", tmp_path / "new", "native", "--plan", "dyt", "--data.path", str(tmp_path))
    assert read(tmp_path / "run", allow_pickle=False, with_optimizer=False)[1].data  # it names its text
