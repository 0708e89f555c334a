"""Whether a configuration fits on GPUs that are not here, how fast it would be there, and what would make it fit.

    python -m tools.plan configs/models/llama-7b.yaml --nodes 8 --gpus-per-node 8 --gpu h100-80gb
    python -m tools.plan configs/models/llama-7b.yaml --gpu a100-40gb --gpus-per-node 4 --train.micro_batch 2 --json

Nothing is trained and no data is opened. Memory is counted by running the model on tensors without values and by the
engine's rules (pretrain/planning); tests/tools/test_plan_measured.py holds it against real steps on a CPU. Speed is
the model's arithmetic at an assumed MFU. Exit code 0: it fits; 1: it does not; 2: a mistake in what was given.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.errors import ConfigError, nearest
from pretrain.arguments import Parser
from pretrain.cli import load
from pretrain.planning import Plan, Remedy, cluster_of, find_remedy, largest_micro_batch, make_plan
from pretrain.planning.cluster import FRAGMENTS, NETWORK, RUNTIME
from pretrain.telemetry.devices import GPUS
from tools.command import run

MFU = 0.4
MFU_SOURCE = "llm-foundry's published 1.3B to 7B on 8 to 512 H100s reach 0.37 to 0.46 in bf16"

_TERMS = {
    "parameters": "parameters, fp32",
    "gathered": "parameters gathered, or copied into bf16",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "loss": "final norm, logits and loss",
    "communication": "buffers of collectives",
    "step": "temporaries of the optimizer's step",
}


_BESIDE = {
    "forward": "forward",
    "backward": "backward",
    "last backward": "the last micro-batch's backward",
    "after": "nothing: after the last backward",
}


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the rest, which are the configuration's overrides."""
    parser = Parser(
        prog="python -m tools.plan",
        usage="%(prog)s CONFIG.yaml [--section.key value ...] [options]",
        description="Memory, speed and communication of a run on GPUs that are not here.",
        epilog="Exit code 0: it fits; 1: it does not; 2: a mistake in what was given.",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="what to plan, as for python -m pretrain")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of each (default 8)")
    parser.add_argument("--gpu", default="h100-80gb", metavar="NAME", help=f"of {', '.join(GPUS)} (default h100-80gb)")
    parser.add_argument(
        "--mfu",
        type=float,
        default=MFU,
        metavar="X",
        help=f"share of the peak that arithmetic reaches (default {MFU}: {MFU_SOURCE})",
    )
    for place in ("intra", "inter"):
        parser.add_argument(
            f"--{place}-node-gb-s",
            type=float,
            metavar="GB/S",
            help=f"10^9 bytes per second, each way, that a GPU's collectives reach {place}-node (default: {NETWORK} of "
            "the data sheet's)",
        )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options, overrides = parser.parse_known_args(arguments)
    if options.gpu not in GPUS:
        raise ConfigError(f"--gpu: no GPU is called {options.gpu!r}; {nearest(options.gpu, GPUS)}")
    if not 0 < options.mfu <= 1:
        raise ConfigError(f"--mfu is {options.mfu:g}: write a share of the peak, above 0 and at most 1")
    return options, overrides


def memory_table(plan: Plan) -> Table:
    """Every term at the moment when a rank holds most."""
    table = Table(title=f"Memory of one GPU at its fullest, {plan.peak.moment}", title_justify="left")
    table.add_column("holds")
    table.add_column("10^9 bytes", justify="right")
    for name, size in asdict(plan.peak.terms).items():
        table.add_row(_TERMS[name], f"{size / 1e9:.3f}")
    table.add_row("CUDA, NCCL and the allocator's gaps, assumed", f"{plan.cluster.reserve / 1e9:.3f}")
    table.add_section()
    table.add_row("together", f"{(plan.peak.terms.total + plan.cluster.reserve) / 1e9:.3f}")
    table.add_row("of", f"{plan.cluster.gpu.memory / 1e9:.3f}")
    if plan.host:
        table.add_row("and of the CPU's memory, for each GPU", f"{plan.host / 1e9:.3f}")
    return table


def traffic_table(plan: Plan) -> Table:
    """What one rank sends in a step."""
    table = Table(title="What one GPU sends in a step", title_justify="left")
    table.add_column("collective, beside")
    for name in ("times", "GB in the node", "GB to others", "seconds"):
        table.add_column(name, justify="right")
    for one in plan.transfers:
        collective = one.collective
        when = {"after": "nothing", "last backward": "last micro-batch's backward"}.get(
            collective.when, collective.when
        )
        table.add_row(
            f"{collective.kind}, {when}",
            f"{one.times}",
            f"{one.intra / 1e9:.3f}",
            f"{one.inter / 1e9:.3f}",
            f"{one.seconds:.3f}",
        )
    return table


def pace_table(plan: Plan, mfu: float) -> Table:
    """Speed and cost of the run."""
    pace, counts = plan.pace, plan.counts
    table = Table(title="Pace", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("FLOPs per token, forward and backward", f"{pace.flops_per_token:,}")
    table.add_row(f"a step's arithmetic at MFU {mfu:g}", f"{pace.compute:.3f} s")
    if pace.recomputed:
        table.add_row("of the forward computed twice", f"{pace.recomputed:.0%}")
    table.add_row("a step's communication", f"{pace.communication:.3f} s")
    table.add_row("of it not hidden", f"{pace.exposed:.3f} s")
    table.add_row("tokens per second", f"{pace.tokens_per_second:,.0f}")
    table.add_row("of one GPU", f"{pace.tokens_per_second / plan.cluster.ranks:,.0f}")
    table.add_row("MFU that is left", f"{pace.mfu:.3f}")
    table.add_row("steps", f"{counts.steps:,}")
    table.add_row("tokens", f"{counts.steps * counts.batch_tokens:,}")
    table.add_row("days", f"{pace.days:.2f}")
    table.add_row("GPU-hours", f"{pace.gpu_hours:,.0f}")
    return table


def headline(plan: Plan, gpu: str) -> list[str]:
    """What is planned, in two lines."""
    cluster, counts = plan.cluster, plan.counts
    return [
        f"{plan.config.name}: {plan.sizes.parameters:,} parameters on {cluster.nodes} x {cluster.gpus_per_node} {gpu}",
        f"a step: {counts.batch_tokens:,} tokens = {counts.world_size} ranks x {counts.accumulation} micro-batches of "
        f"{counts.micro_batch} x {counts.sequence_length} tokens",
    ]


def verdict(plan: Plan, largest: int | None, remedy: Remedy | None) -> list[str]:
    """Whether the network keeps up, whether it fits, and what would make it."""
    hidden = "hides" if plan.pace.exposed <= 0.01 * plan.pace.compute else "does not hide"
    lines = []
    if plan.transfers:
        lines.append(
            f"the arithmetic {hidden} the network: {plan.pace.exposed:.3f} s of {plan.pace.communication:.3f} s stay"
        )
    lines.append(f"largest micro-batch that fits: {largest or 'none'}")
    if plan.fits:
        return [*lines, "fits"]
    needs = (plan.peak.terms.total + plan.cluster.reserve) / 1e9
    lines.append(f"does not fit: {needs:.1f} of {plan.cluster.gpu.memory / 1e9:.1f} GB")
    if remedy is None:
        return [*lines, "nothing that this program knows would make it fit"]
    faster = remedy.plan.pace.tokens_per_second / plan.pace.tokens_per_second
    lines.append("fits with " + " ".join(change.write for change in remedy.changes))
    lines += [f"  {change.write}: {change.cost}" for change in remedy.changes]
    after = (remedy.plan.peak.terms.total + remedy.plan.cluster.reserve) / 1e9
    host = f", and {remedy.plan.host / 1e9:.1f} GB of the CPU's for each GPU" if remedy.plan.host else ""
    return [*lines, f"  then {after:.1f} GB{host}; tokens per second times {faster:.2f}"]


def assumptions(plan: Plan, options: argparse.Namespace) -> list[str]:
    """What the figures rest on that is not counted."""
    cluster, config = plan.cluster, plan.config
    lines = [
        f"{RUNTIME / 1e9:g} GB for CUDA and NCCL and {FRAGMENTS:.0%} for the allocator's gaps: assumed, not measured",
        f"MFU {options.mfu:g}" + (f": {MFU_SOURCE}" if options.mfu == MFU else ""),
    ]
    if cluster.ranks > 1:
        inter = f", {cluster.inter_node / 1e9:g} between" if cluster.inter_node and cluster.nodes > 1 else ""
        lines.append(
            f"GB/s of a GPU, each way: {cluster.intra_node / 1e9:g} in a node{inter}; unless given, {NETWORK:g} of "
            "the data sheets' (pretrain/telemetry/devices.py)"
        )
    if config.train.kernels != "torch":
        lines.append("the fused kernels are counted; --train.kernels torch counts PyTorch's operations")
    if config.train.compile and config.train.activation_checkpointing == "none":
        lines.append(
            "compiled blocks save what torch's partitioner lets them; within one they are counted as not fused"
        )
    elif config.train.compile:
        lines.append("compiled blocks are counted as not compiled: with recomputation they save the same or less")
    if config.precision.fp8 != "none":
        lines.append(f"fp8 {config.precision.fp8}: activations and pace are counted as those of bf16")
    return lines


def as_json(plan: Plan, options: argparse.Namespace, largest: int | None, remedy: Remedy | None) -> dict[str, Any]:
    """The tables' figures: bytes and seconds."""
    cluster = plan.cluster
    return {
        "name": plan.config.name,
        "gpu": options.gpu,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "parameters": plan.sizes.parameters,
        "counts": asdict(plan.counts) | {"batch_tokens": plan.counts.batch_tokens},
        "memory": asdict(plan.peak.terms)
        | {"reserve": cluster.reserve, "total": plan.peak.terms.total + cluster.reserve, "of": cluster.gpu.memory},
        "fullest": str(plan.peak.moment),
        "host_memory": plan.host,
        "fits": plan.fits,
        "largest_micro_batch": largest,
        "traffic": [
            {
                "collective": one.collective.kind,
                "beside": one.collective.when,
                "times": one.times,
                "intra_node": one.intra,
                "inter_node": one.inter,
                "seconds": one.seconds,
            }
            for one in plan.transfers
        ],
        "pace": asdict(plan.pace) | {"assumed_mfu": options.mfu},
        "remedy": None
        if remedy is None
        else {
            "changes": [{"write": change.write, "cost": change.cost} for change in remedy.changes],
            "total": remedy.plan.peak.terms.total + remedy.plan.cluster.reserve,
            "host_memory": remedy.plan.host,
            "tokens_per_second": remedy.plan.pace.tokens_per_second,
        },
        "assumptions": assumptions(plan, options),
    }


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    options, overrides = parse(arguments)
    bandwidths = [None if x is None else x * 1e9 for x in (options.intra_node_gb_s, options.inter_node_gb_s)]
    cluster = cluster_of(GPUS[options.gpu], options.nodes, options.gpus_per_node, *bandwidths)
    plan = make_plan(load(options.config, overrides), cluster, options.mfu)
    largest = largest_micro_batch(plan, options.mfu)
    remedy = None if plan.fits else find_remedy(plan, options.mfu)
    if options.json:
        print(json.dumps(as_json(plan, options, largest, remedy), indent=2))
        return 0 if plan.fits else 1
    console = Console(highlight=False, soft_wrap=True)
    for line in headline(plan, options.gpu):
        console.print(line, markup=False)
    console.print(memory_table(plan))
    if plan.transfers:
        console.print(traffic_table(plan))
    console.print(pace_table(plan, options.mfu))
    for line in verdict(plan, largest, remedy):
        console.print(line, markup=False)
    console.print("assumed:", *(f"  {line}" for line in assumptions(plan, options)), sep="\n", markup=False)
    return 0 if plan.fits else 1


if __name__ == "__main__":
    run(lambda: sys.exit(main(sys.argv[1:])))
