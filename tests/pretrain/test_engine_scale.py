"""A 7B model on 512 ranks, of which this process is one and the others are pretended: no rank ever holds it whole."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from models import parameter_roles
from models.initialization import chunk_of, first_rows
from pretrain.cli import load
from pretrain.distributed import World
from pretrain.engines import build_engine
from pretrain.telemetry.throughput import memory_gb
from tests.ranks import run_ranks
from tests.runs import ONE_THREAD, REPOSITORY

PARAMETERS = 6_738_415_616  # LLaMA-7B's
RANKS = 512


def materialize(plan: str, rank: int) -> dict[str, Any]:
    """Build and initialize ``rank``'s part of the 7B configuration; what it took and what it has."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = load(REPOSITORY / "configs/models/llama-7b.yaml", ["--model.plan", plan, "--train.compile", "false"])
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    before = memory_gb(torch.device("cpu"))
    engine = build_engine(config, World(rank, RANKS, torch.device("cpu")))
    engine.initialize()
    after = memory_gb(torch.device("cpu"))
    roles = parameter_roles(engine.model)
    name = "blocks.31.feedforward.down.weight"
    parameter = engine.model.get_parameter(name)
    rows = chunk_of(range(parameter.shape[0]), rank, RANKS)
    expected = first_rows(name, roles[name], parameter.shape, rows, config.model, config.seed)
    assert isinstance(parameter, DTensor)
    held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in engine.model.parameters())
    return {
        "gigabytes": after - before,
        "elements": held,
        "whole": sum(shape.numel() for shape in engine.shapes.values()),
        "same": parameter.to_local().equal(expected),
        "std": parameter.to_local().std().item(),
    }


@pytest.mark.parametrize(
    ("plan", "rank"),
    [
        pytest.param("llama", 0, marks=pytest.mark.survey),
        pytest.param("dyt", 511, marks=pytest.mark.survey),
        ("dnt", 300),
    ],
)
def test_7b_on_512_ranks(plan: str, rank: int) -> None:
    program = (
        "import json; from tests.pretrain.test_engine_scale import materialize; "
        f"print(json.dumps(materialize({plan!r}, {rank})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=ONE_THREAD, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["whole"] - PARAMETERS) < 2e6  # norms and scales differ between plans
    # a 512th of the matrices, rounded up to rows (the last ranks get fewer), and the gains, of which every rank has all
    assert PARAMETERS / RANKS * 0.5 < found["elements"] < PARAMETERS / RANKS * 1.2
    # the shard in fp32 twice (what it is drawn into, and the parameter), one portion of a draw, and the graph of
    # modules: a hundredth of the 27 GB that the model takes
    assert found["gigabytes"] < 0.3
    assert found["same"]
    assert found["std"] == pytest.approx(0.02, rel=0.02)


def drawn(name: str, rows: range) -> torch.Tensor:
    from models.config import ModelConfig

    return first_rows(name, "matrix", torch.Size((3000, 4096)), rows, ModelConfig(vocab_size=8), 3)


def test_rows_of_a_large_parameter_are_the_whole_s() -> None:
    """It is drawn in portions of 2^22 elements, 1,024 rows here; a cut through them changes nothing."""
    whole = drawn("w", range(3000))
    for rows in (range(1), range(1000, 1030), range(1024, 2048), range(2999, 3000), range(500, 2500), range(7, 7)):
        assert drawn("w", rows).equal(whole[rows.start : rows.stop])
    assert not whole[:1024].equal(whole[1024:2048]), "each portion has numbers of its own"
    assert whole.std().item() == pytest.approx(0.02, rel=1e-3)  # 12 million draws: a standard error of 2e-4


def zero3_peak() -> float:
    """Of a rank's memory while a model of 0.4 GB gets storage under ZeRO-3, in gigabytes."""
    from models import Transformer
    from pretrain.counts import derive_counts
    from pretrain.engines.deepspeed import _materialize_in_partitions, deepspeed_config
    from tests.pretrain.engine_runs import config_of, here

    parallel = {"engine": "deepspeed", "zero_stage": 3}
    build_engine(config_of(parallel=parallel), here())  # what DeepSpeed itself takes is not counted
    config = config_of(model={"width": 512, "depth": 24, "ffn_width": 2048, "heads": 8}, parallel=parallel)
    with torch.device("meta"):
        model = Transformer(config.model)
    before = memory_gb(torch.device("cpu"))
    settings = deepspeed_config(config, derive_counts(config, dist.get_world_size()))
    _materialize_in_partitions(model, torch.device("cpu"), settings)
    return memory_gb(torch.device("cpu")) - before


def test_zero_3_is_made_partition_by_partition() -> None:
    whole = 4 * 24 * (4 * 512 * 512 + 3 * 512 * 2048) / 1e9
    for peak in run_ranks(zero3_peak, 4, timeout=200):
        assert peak < 0.75 * whole  # a quarter of it, one module, and what the first rank keeps for all
