"""--fold-gains: what is written, what the folder says, the way back, and refusals."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

from models import ConfigError, Transformer
from pretrain.run import RunFolder
from tests.models.building import tiny, tokens
from tests.tools.converting import assert_bitwise, model_of, run_convert, write_run
from tools import convert
from tools.exported.modeling_equipoise import EquipoiseForCausalLM
from tools.formats import folding
from tools.formats.lazy import LazyTensor

LLAMA: dict[str, Any] = {"plan": "llama", "trunk": "llama"}
GPT: dict[str, Any] = {"plan": "gpt", "trunk": "gpt", "bias": True}
# fp32 and logits of some units, as in test_convert.py: one rounding is the weight's in place of the activation's.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


STOCK: dict[str, tuple[dict[str, Any], type[nn.Module], set[str]]] = {
    "llama": (LLAMA, LlamaForCausalLM, set()),
    "llama tied, biases": ({**LLAMA, "tied": True, "bias": True}, LlamaForCausalLM, {"model.norm.weight"}),
    "gpt": (GPT, GPT2LMHeadModel, {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
    "gpt untied, without biases": ({**GPT, "bias": False, "tied": False}, GPT2LMHeadModel, set()),
    "gpt, no shift in the last norm": (
        {**GPT, "sites": {"final": {"function": "layernorm", "bias": False}}},
        GPT2LMHeadModel,
        {"transformer.ln_f.weight"},
    ),
}


@pytest.mark.parametrize(("shape", "kind", "left"), STOCK.values(), ids=STOCK)
@torch.no_grad()
def test_a_folded_model_is_still_transformers_own(
    shape: dict[str, Any], kind: type[nn.Module], left: set[str], tmp_path: Path
) -> None:
    """With gains of one, and back as it was folded; without config.yaml as a model that has such gains."""
    config = tiny(**shape)
    ours = write_run(tmp_path / "run", config)
    hf = run_convert(tmp_path / "run", tmp_path / "hf", "hf", "--fold-gains")
    theirs = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    assert type(theirs) is kind
    text = tokens()
    expected = ours(text)
    torch.testing.assert_close(theirs(text).logits, expected, **CLOSE)
    norms = {name: tensor for name, tensor in theirs.named_parameters() if "norm" in name or ".ln_" in name}
    assert {name for name, t in norms.items() if not (t == float(name.endswith(".weight"))).all()} == left
    back = run_convert(hf, tmp_path / "back", "native")
    read = RunFolder(back).read_config().model
    assert read.sites["attn_in"]["gain"] is False
    direct = run_convert(tmp_path / "run", tmp_path / "direct", "native", "--fold-gains")
    assert read == RunFolder(direct).read_config().model
    assert_bitwise(model_of(back), model_of(direct))
    again = run_convert(back, tmp_path / "again", "hf")
    assert_bitwise(load_file(again / "model.safetensors"), load_file(hf / "model.safetensors"))

    (hf / "config.yaml").unlink()
    foreign = run_convert(hf, tmp_path / "foreign", "native")
    assert RunFolder(foreign).read_config().model.sites == {}
    assert {n for n in model_of(foreign) if n.endswith("attn_in.weight")} == {
        f"blocks.{i}.attn_in.weight" for i in (0, 1)
    }
    redone = Transformer(RunFolder(foreign).read_config().model).eval()
    redone.load_state_dict(model_of(foreign))
    torch.testing.assert_close(redone(text), expected, **CLOSE)


@pytest.mark.parametrize(
    ("shape", "gain"),
    [(LLAMA, "model.layers.1.input_layernorm.weight"), (GPT, "transformer.h.1.ln_2.weight")],
    ids=["llama", "gpt"],
)
def test_a_gain_that_came_in_afterwards_is_not_dropped(shape: dict[str, Any], gain: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny(**shape))
    hf = run_convert(tmp_path / "run", tmp_path / "hf", "hf", "--fold-gains")
    tensors = load_file(hf / "model.safetensors")
    tensors[gain][3] = 1.01
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=f"was written without gains, but there is {gain}: remove its config.yaml"
    ) as error:
        run_convert(hf, tmp_path / "back", "native")
    assert "\n" not in str(error.value)
    (hf / "config.yaml").unlink()
    run_convert(hf, tmp_path / "back", "native")
    ours = "blocks.1.attn_in.weight" if shape is LLAMA else "blocks.1.mlp_in.weight"
    assert model_of(tmp_path / "back")[ours][3] == pytest.approx(1.01)


@torch.no_grad()
def test_folders_with_their_own_code_say_it_in_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = write_run(tmp_path / "run", tiny(plan="dyt", bias=True, sites={"mlp_in": {"function": "dyt", "beta": True}}))
    hf = run_convert(tmp_path / "run", tmp_path / "hf", "hf", "--fold-gains", "--verify")
    note = "gains of attn_in, final, gains and shifts of mlp_in folded into the next linears"
    assert note in capsys.readouterr().out
    assert (hf / "config.yaml").read_text().splitlines()[0] == f"# {note}"
    sites = json.loads((hf / "config.json").read_text())["sites"]
    assert sites["mlp_in"] == {"function": "dyt", "alpha": "learned", "gain": False, "beta": False, "shift": False}
    theirs = EquipoiseForCausalLM.from_pretrained(hf)
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()), **CLOSE)
    back = run_convert(hf, tmp_path / "back", "native")
    assert_bitwise(
        {f"model.{name}": tensor for name, tensor in model_of(back).items()}, load_file(hf / "model.safetensors")
    )


@pytest.mark.parametrize("target", convert.TARGETS)
def test_every_folder_says_it(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And is verified against the source, in which the gains are apart."""
    write_run(tmp_path / "run", tiny(**LLAMA, tied=True))
    out = run_convert(tmp_path / "run", tmp_path / "out", target, "--fold-gains", "--verify")
    said = capsys.readouterr().out
    note = "gains of attn_in, mlp_in folded into the next linears; left: final (the head is tied)"
    assert f"  {note}\n" in said
    assert "against the unfolded source: maximal absolute difference" in said
    assert ("decay and learning rate now act on the products" in said) is (target in ("native", "deepspeed"))
    assert (out / "config.yaml").read_text().startswith(f"# {note}\n")
    sites = RunFolder(out).read_config().model.sites
    assert sites == {site: {"function": "rmsnorm", "gain": False} for site in ("attn_in", "mlp_in")}


def test_bf16_products_are_verified_before_they_are_rounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From fp32, and from weights that were bf16 already, which are rounded a second time; in a run's folder, which is
    fp32, they are not."""
    write_run(tmp_path / "run", tiny(**LLAMA))
    half = run_convert(tmp_path / "run", tmp_path / "half", "hf", "--dtype", "bf16")
    capsys.readouterr()
    rounded = r"folded in fp32, against the source: .*; rounding the weights moved them by up to (.*)"
    for name, options in (("run", ["--dtype", "bf16"]), ("half", [])):
        out = run_convert(tmp_path / name, tmp_path / f"{name}-out", "hf", "--fold-gains", "--verify", *options)
        found = re.search(rounded, capsys.readouterr().out)
        assert found
        assert 1e-4 < float(found[1]) < 0.5  # 2^-9 of each weight
        assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    run_convert(half, tmp_path / "native", "native", "--fold-gains", "--verify")
    assert "against the unfolded source" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--dtype", "bf16"]], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", ["rows", "left out"])
def test_a_wrong_product_is_found(
    fault: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", tiny(**LLAMA))
    right = folding._scaled

    def wrong(weight: LazyTensor, gain: LazyTensor) -> LazyTensor:
        if weight.shape[0] != weight.shape[1]:
            return right(weight, gain)
        if fault == "left out":
            return weight
        return replace(weight, read=lambda: weight.read() * gain.read()[:, None])

    monkeypatch.setattr(folding, "_scaled", wrong)
    with pytest.raises(ConfigError, match=r"source: maximal absolute difference .*: the conversion is wrong"):
        run_convert(tmp_path / "run", tmp_path / "out", "hf", "--fold-gains", "--verify", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"plan": "none"}, "there is nothing to fold; there are no norms: leave it out"),
    (
        {"plan": "olmo2", "tied": True},
        r"query, key, attn_out, mlp_out \(no linear comes next\), final \(the head is tied\)",
    ),
    ({"plan": "derf"}, r"attn_in, mlp_in, final \(the next linear has no bias for its shift\): leave it out"),
]


@pytest.mark.parametrize(("shape", "reason"), REFUSED, ids=[str(shape["plan"]) for shape, _ in REFUSED])
def test_nothing_to_fold_is_refused(shape: dict[str, Any], reason: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny(**shape))
    with pytest.raises(ConfigError, match=f"--fold-gains: .*{reason}") as error:
        run_convert(tmp_path / "run", tmp_path / "out", "native", "--fold-gains")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_folding_twice_and_optimizer_state_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", tiny(**LLAMA))
    with pytest.raises(ConfigError, match=r"--fold-gains: the optimizer's state does not fit .* leave --optimizer out"):
        run_convert(tmp_path / "run", tmp_path / "out", "native", "--fold-gains", "--optimizer")
    once = run_convert(tmp_path / "run", tmp_path / "once", "native", "--fold-gains")
    with pytest.raises(ConfigError, match=r"nothing to fold; attn_in, mlp_in, final \(no gain there\)"):
        run_convert(once, tmp_path / "twice", "native", "--fold-gains")


def test_the_help_tells_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        convert.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--fold-gains multiply the gains of norms into the linears that read them" in said
    assert "config.yaml says which gains are in the next linears, and which are left and why" in said
