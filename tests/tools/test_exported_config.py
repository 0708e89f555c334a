"""config.json of the folder with its own code: what it says, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from models import ConfigError, ModelConfig
from models.config import ResidualConfig
from models.norms import NORMS
from models.plan import SITES, NormPlan
from tests.models.building import tiny
from tools.exported import RESIDUALS, SETTINGS, WEIGHTS, norms_equipoise, remote_code_files, remote_config
from tools.exported.configuration_equipoise import EquipoiseConfig


def test_every_function_and_site_is_exported() -> None:
    """What is added to ours is to be added there."""
    assert norms_equipoise.NORMS.keys() == SETTINGS.keys() == NORMS.keys()
    assert norms_equipoise.SITES == SITES
    schemes, weights = (
        get_type_hints(kind)[key] for kind, key in ((ResidualConfig, "scheme"), (ModelConfig, "weights"))
    )
    assert {"plan", *RESIDUALS} == set(get_args(schemes))
    assert {"plan", *WEIGHTS} == set(get_args(weights))
    written = {"sites", "first", "first_blocks", "embedding_scale", "qk_scope", "residual", "weights"}
    assert {field.name for field in fields(NormPlan)} == {*written, "init"}, "first weights are no matter"


def test_a_function_without_an_exported_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS, "mine", NORMS["l2norm"])
    config = tiny(plan="dnt", sites={"final": "mine"})
    for export in (remote_config, remote_code_files):
        with pytest.raises(ConfigError, match=r"model\.sites\.final: mine has no exported form"):
            export(config)
    with pytest.raises(ConfigError, match=r"model\.residual\.scheme: mine has no exported form"):
        remote_config(tiny(residual=ResidualConfig("mine")))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.weights: mine has no exported form"):
        remote_config(tiny(weights="mine"))


def test_the_configuration_is_resolved() -> None:
    sites = {"mlp_mid": "derf", "mlp_out": {"function": "rmsnorm", "gain": False}, "final": "layernorm"}
    written = remote_config(tiny(plan="olmo2", ffn_width=None, sites=sites))
    assert json.loads(json.dumps(written)) == written
    assert None not in written.values()
    assert (written["num_key_value_heads"], written["intermediate_size"]) == (4, 128)
    assert (written["qk_scope"], written["tie_word_embeddings"]) == ("projection", False)
    assert written["sites"] == {
        "query": {"function": "rmsnorm", "eps": 1e-5, "gain": True},
        "key": {"function": "rmsnorm", "eps": 1e-5, "gain": True},
        "attn_out": {"function": "rmsnorm", "eps": 1e-5, "gain": True},
        "mlp_mid": {"function": "derf", "alpha": "learned", "gain": True, "beta": True, "shift": True},
        "mlp_out": {"function": "rmsnorm", "eps": 1e-5, "gain": False},
        "final": {"function": "layernorm", "eps": 1e-5, "bias": False, "gain": True},
    }
    assert (written["residual"], written["residual_constant"], written["weights"]) == ("plain", 1.0, "plain")
    assert (written["first_sites"], written["first_blocks"]) == ({}, 0)


def test_first_blocks_scheme_and_fixed_alphas_are_resolved() -> None:
    norm = {"function": "rmsnorm", "eps": 1e-5, "gain": True}
    written = remote_config(tiny(plan="mix-ln", depth=9, residual=ResidualConfig("deepnorm")))
    assert written["sites"] == dict.fromkeys(("attn_in", "mlp_in", "final"), norm)
    assert (written["first_sites"], written["first_blocks"]) == ({"attn_post": norm, "mlp_post": norm}, 2)
    assert (written["residual"], written["residual_constant"]) == ("deepnorm", 18**0.25)
    whole = remote_config(tiny(plan="mix-ln", first_blocks=2))
    assert whole["sites"] == dict.fromkeys(("attn_post", "mlp_post", "final"), norm)
    assert (whole["first_sites"], whole["first_blocks"]) == ({}, 0), "no other block is left"
    fixed = remote_config(tiny(plan="none", width=2048, sites={"mlp_in": {"function": "isru", "alpha": "fixed"}}))
    assert fixed["sites"]["mlp_in"] == {"function": "isru", "alpha": 0.5, "gain": True, "beta": False, "shift": False}
    assert remote_config(tiny(plan="nf"))["residual_constant"] == 0.2


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_rotary_positions_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match="plain rotary positions"):
        EquipoiseConfig(**{key: {"rope_type": "linear", "factor": 2.0}})
