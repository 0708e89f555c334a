"""A folder of ours that transformers has saved again: config.json alone says what the model is."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from models import ConfigError, ModelConfig
from models.config import ResidualConfig
from models.plan import BLOCK_SITES, PLANS, SITES
from models.residual import CONSTANT
from pretrain.cli import load as load_config
from tests.models.building import tiny, tokens
from tests.runs import metrics, write_config
from tests.tools.converting import assert_bitwise, model_of, run_convert, write_run
from tests.tools.small_run import WORLD
from tests.tools.test_exported import CASES, OTHERS
from tools.exported import RESIDUALS, SETTINGS, WEIGHTS, defaults, remote_config
from tools.exported.configuration_equipoise import EquipoiseConfig
from tools.exported.modeling_equipoise import EquipoiseForCausalLM
from tools.formats import source
from tools.formats.config_json import model_config
from tools.formats.huggingface import stock_architecture
from tools.formats.verification import transformer

OWN = {name: shape for name, shape in CASES.items() if not stock_architecture(tiny(**shape))[0]}


def save_again(folder: Path, destination: Path) -> Path:
    EquipoiseForCausalLM.from_pretrained(folder).save_pretrained(destination)
    return destination


@torch.no_grad()
@pytest.mark.parametrize("case", OWN)
def test_what_transformers_saved_again_is_the_same_model(case: str, tmp_path: Path) -> None:
    config = tiny(**OWN[case], rope_theta=500.0, dropout=0.1)
    ours = write_run(tmp_path / "run", config).eval()
    again = save_again(run_convert(tmp_path / "run", tmp_path / "hf", "hf"), tmp_path / "again")
    assert not {"config.yaml", "equipoise.json"} & {path.name for path in again.iterdir()}
    run_convert(again, tmp_path / "back", "native")
    assert_bitwise(model_of(tmp_path / "back"), ours.state_dict())
    _, read = source.read(tmp_path / "back", allow_pickle=False, with_optimizer=False)
    assert torch.equal(transformer(read.config.model, read.model)(tokens()), ours(tokens()))
    assert remote_config(read.config.model) == remote_config(config)
    if case not in OTHERS:
        assert (read.config.model.plan, read.config.model.sites) == (case, {})
    elif config.sites:
        assert read.config.model.plan == "none"


def test_saved_into_the_folder_itself_it_stays_the_run(tmp_path: Path) -> None:
    """config.yaml still stands there, and config.json says the same in other words."""
    ours = write_run(tmp_path / "run", tiny(plan="dyt"), step=9)
    folder = run_convert(tmp_path / "run", tmp_path / "hf", "hf")
    before = (folder / "config.json").read_bytes()
    save_again(folder, folder)
    assert (folder / "config.json").read_bytes() != before
    run_convert(folder, tmp_path / "back", "native")
    assert_bitwise(model_of(tmp_path / "back"), ours.state_dict())
    assert [path.name for path in (tmp_path / "back" / "checkpoints").iterdir()] == ["step-00000009"]
    change(folder, rope_theta=123.0)
    with pytest.raises(ConfigError, match=r"config.yaml makes rope_theta 10000.0, config.json says 123.0: remove"):
        run_convert(folder, tmp_path / "refused", "native")


def test_it_trains_on(corpus: Path, tmp_path: Path) -> None:
    """From the loss that it had, once the tokenizer that the text was prepared with lies beside it."""
    from pretrain.trainer import Outcome, Trainer

    def train(config: Path) -> list[float]:
        trainer = Trainer(load_config(config), WORLD)
        assert trainer.run() is Outcome.FINISHED
        return [record["loss"] for record in metrics(trainer.folder.path) if "loss" in record]

    shape = {"plan": "dnt", "width": 32, "depth": 2, "heads": 2, "context": 32}
    optimizer = {"name": "adamw", "lr": 0.01}
    before = train(write_config(tmp_path, corpus, {"model": shape, "optimizer": optimizer, "train": {"steps": 40}}))
    folder = run_convert(tmp_path / "runs" / "small", tmp_path / "hf", "hf")
    again = save_again(folder, tmp_path / "again")
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    overrides = ["--data.path", str(corpus), "--train.steps", "3", "--optimizer.lr", "1e-3", "--log.every", "1"]
    with pytest.raises(ConfigError, match="no sentencepiece model, so it cannot be trained"):
        run_convert(again, tmp_path / "refused", "native", *overrides)
    shutil.copy(folder / "tokenizer.model", again)
    after = train(run_convert(again, tmp_path / "more", "native", *overrides, "--device", "cpu") / "config.yaml")
    assert len(after) == 3
    assert abs(after[0] - before[-1]) < 0.3 < before[0] - before[-1], (before, after)


def test_absent_keys_mean_what_the_class_says() -> None:
    by_class = {f.name: getattr(EquipoiseConfig(), f.name) for f in fields(EquipoiseConfig)}
    ours = defaults()
    assert ours == {key: by_class[key] for key in ours}
    assert ours.keys() == EquipoiseConfig.__annotations__.keys()
    assert model_config({"model_type": "equipoise"}, Path()) == model_config(
        {"model_type": "equipoise", "pad_token_id": None, "auto_map": {"AutoConfig": "x"}, **ours}, Path()
    )


L2 = {"function": "l2norm", "eps": 0.5}
OTHER_VALUES = {
    "trunk": "gpt",
    "sites": {"embed": L2},
    "first_sites": {"mlp_act": L2},
    "first_blocks": 2,
    "residual": "nf",
    "residual_constant": 0.25,
    "weights": "sigma",
    "embedding_scale": True,
    "qk_scope": "projection",
    "vocab_size": 7,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "intermediate_size": 5,
    "max_position_embeddings": 6,
    "rope_theta": 0.5,
    "bias": True,
    "tie_word_embeddings": True,
    "dropout": 0.5,
}


TOGETHER = {  # what is nothing alone
    "first_sites": {"first_blocks": 1},
    "first_blocks": {"first_sites": {"value": L2}},
    "residual": {"residual_constant": 0.75},
    "residual_constant": {"residual": "scaled"},
}


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_every_key_is_read(key: str) -> None:
    more = TOGETHER.get(key, {})
    before = remote_config(model_config({"model_type": "equipoise"}, Path()))
    after = remote_config(model_config({"model_type": "equipoise", key: OTHER_VALUES[key], **more}, Path()))
    assert before.keys() - OTHER_VALUES.keys() == {"architectures", "auto_map", "model_type", "use_cache"}
    assert before[key] == getattr(EquipoiseConfig(), key)
    assert after == before | {key: OTHER_VALUES[key], **more}


def test_folders_without_the_newer_keys_are_read() -> None:
    """Their functions had no setting but beta and gain, and derf always had its shift."""
    old = {"dyt": {"function": "dyt", "beta": True}, "derf": {"function": "derf", "beta": False, "gain": False}}
    described = {"model_type": "equipoise", "sites": {"attn_in": old["dyt"], "mlp_in": old["derf"]}}
    assert remote_config(model_config(described, Path()))["sites"] == {
        "attn_in": {"function": "dyt", "alpha": "learned", "gain": True, "beta": True, "shift": False},
        "mlp_in": {"function": "derf", "alpha": "learned", "gain": False, "beta": False, "shift": True},
    }


VALUES = {"eps": st.sampled_from([1e-6, 1e-5, 0.5]), "alpha": st.sampled_from(["learned", 0.5, 1.0])}
VALUES |= dict.fromkeys(("bias", "beta", "gain", "shift"), st.booleans())
ENTRIES = st.one_of(
    [st.fixed_dictionaries({"function": st.just(f), **{k: VALUES[k] for k in keys}}) for f, keys in SETTINGS.items()]
)


@settings(max_examples=100)
@given(
    plan=st.sampled_from(sorted(PLANS)),
    sites=st.dictionaries(st.sampled_from(SITES), ENTRIES | st.just("none")),
    first=st.dictionaries(st.sampled_from(BLOCK_SITES), ENTRIES | st.just("none")),
    first_blocks=st.sampled_from([None, 1, 2, 3, 0.5]),
    scheme=st.sampled_from(["plan", *RESIDUALS]),
    constant=st.sampled_from([None, 0.5, 1.0]),
    weights=st.sampled_from(["plan", *WEIGHTS]),
    scale=st.sampled_from(["plan", "none", "learned"]),
    scope=st.sampled_from(["plan", "head", "projection"]),
    bias=st.booleans(),
    eps=st.sampled_from([1e-6, 1e-5]),
)
def test_config_json_is_read_as_it_is_written(
    plan: str,
    sites: dict[str, Any],
    first: dict[str, Any],
    first_blocks: int | float | None,
    scheme: Any,
    constant: float | None,
    weights: str,
    scale: str,
    scope: str,
    bias: bool,
    eps: float,
) -> None:
    shape = {"bias": bias, "norm_eps": eps, "dropout": 0.25, "kv_heads": 2, "depth": 3, "tied": False}
    changes = {"sites": sites, "first_sites": first if first_blocks else {}, "first_blocks": first_blocks}
    residual = ResidualConfig(scheme, constant=constant if scheme in CONSTANT else None)
    methods = {"residual": residual, "weights": weights, "embedding_scale": scale, "qk_scope": scope}
    config = tiny(**shape, plan=plan, **changes, **methods)
    written = json.loads(json.dumps(remote_config(config)))
    found: ModelConfig = model_config(written, Path())
    assert remote_config(found) == written
    if not sites and first_blocks is None and residual == ResidualConfig() and weights == scale == scope == "plan":
        # an eps that no function has is not there to be read
        assert found == replace(config, plan=found.plan, norm_eps=found.norm_eps)


def change(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("saved")
    write_run(home / "run", tiny(plan="dnt"))
    return save_again(run_convert(home / "run", home / "hf", "hf"), home / "again")


NORM = {"function": "rmsnorm", "eps": 1e-5, "gain": True}
DYT = {"function": "dyt", "alpha": "learned", "gain": True, "beta": False, "shift": False}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"trunk": "bert"}, r"config.json: trunk is 'bert': it has to be llama or gpt"),
    ({"trunk": ["llama"]}, r"trunk is \['llama'\]"),
    ({"qk_scope": 1}, r"qk_scope is 1: it has to be head or projection"),
    ({"hidden_size": "32"}, r"config.json: hidden_size is '32': it has to be a positive number"),
    ({"hidden_size": 31}, r"config.json: model.width 31 is not a multiple"),
    ({"num_hidden_layers": 1.5}, r"num_hidden_layers is 1.5: it has to be a whole number"),
    ({"vocab_size": True}, r"vocab_size is True"),
    ({"dropout": -0.1}, r"dropout is -0.1: it has to be a positive number"),
    ({"dropout": 1.0}, r"config.json: model.dropout is 1.0"),
    ({"dropout": "0"}, r"dropout is '0'"),
    ({"bias": 1}, r"bias is 1: it has to be true or false"),
    ({"embedding_scale": "learned"}, r"embedding_scale is 'learned': it has to be true or false"),
    ({"rope_theta": float("inf")}, r"rope_theta is inf"),
    ({"rope_scaling": {"rope_type": "linear"}}, r"rope_scaling .* not known here"),
    ({"window": 4}, r"has window 4, which is not known here"),
    ({"sites": ["embed"]}, r"has sites \['embed'\], which is no mapping"),
    ({"sites": {"embd": NORM}}, r"sites.embd: there is no such site; .*embed"),
    ({"sites": {"embed": "rmsnorm"}}, r"sites.embed is 'rmsnorm': it has to name one of the functions rmsnorm"),
    ({"sites": {"embed": NORM | {"function": "rms"}}}, r"sites.embed is .*: it has to name one of the functions"),
    ({"sites": {"embed": {"function": "rmsnorm"}}}, r"sites.embed lacks eps: rmsnorm has eps, gain"),
    ({"sites": {"embed": NORM | {"beta": True}}}, r"sites.embed has beta: rmsnorm has eps, gain"),
    ({"sites": {"embed": NORM | {"eps": "tiny"}}}, r"sites.embed: eps is 'tiny': it has to be a positive number"),
    ({"sites": {"embed": NORM | {"gain": "no"}}}, r"sites.embed: gain is 'no': it has to be true or false"),
    ({"sites": {"embed": DYT | {"alpha": -1.0}}}, r"sites.embed: alpha is -1.0: it has to be a positive number"),
    ({"sites": {"embed": DYT | {"alpha": "fixed"}}}, r"sites.embed: alpha is 'fixed'"),
    ({"first_sites": {"final": NORM}}, r"first_sites.final: there is no such site"),
    ({"first_sites": {"value": NORM}}, r"config.json: model.first_sites change nothing with no first blocks"),
    ({"first_blocks": -1}, r"first_blocks is -1: it has to be a positive number"),
    ({"residual": "sum"}, r"residual is 'sum': it has to be plain, rezero, .* or deepnorm"),
    ({"residual_constant": 2.0}, r"has residual_constant 2.0, which plain does not have"),
    ({"weights": "spectral"}, r"weights is 'spectral': it has to be plain, standardized or sigma"),
    ({"sites": {}}, r"also has .*: its configuration describes another model"),
    ({"architectures": ["LlamaForCausalLM"]}, r"describes the architecture LlamaForCausalLM \(model_type equipoise\)"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_what_is_wrong_in_config_json_is_said(
    changes: dict[str, Any], message: str, saved: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    change(tmp_path / "copy", **changes)
    with pytest.raises(ConfigError, match=message) as refused:
        run_convert(tmp_path / "copy", tmp_path / "out", "native")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
