"""Draw the loss curves of one or more runs.

python -m tools.report runs/tiny runs/other --output curves.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.errors import ConfigError
from pretrain.arguments import Parser
from pretrain.run import RunFolder
from tools.command import run


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """What the run in this folder logged, in order."""
    records = RunFolder(path).records()
    if not records:
        raise ConfigError(f"{path} has no steps in metrics.jsonl: name a run's folder, once it has logged")
    return records


def labels(paths: list[Path]) -> list[str]:
    """The folders' names, or their paths where two have the same name."""
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def draw(runs: list[tuple[str, list[dict[str, Any]]]], output: Path) -> None:
    """Training loss (thin) and validation loss (dots) over tokens, one color a run."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for i, (name, records) in enumerate(runs):
        training = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
        held_out = [(r["tokens"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
        label = name
        if held_out:
            bits = next(r["val_bits_per_byte"] for r in reversed(records) if r.get("val_loss") is not None)
            label += f"\n{bits:.3f} bits per byte"
            axes.plot(*zip(*held_out, strict=True), "o-", color=f"C{i}", markersize=4, linewidth=1.5, label=label)
        if training:
            own = None if held_out else label
            axes.plot(*zip(*training, strict=True), color=f"C{i}", alpha=0.5, linewidth=1, label=own)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token): training as a line, validation as dots")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, labelspacing=0.9)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:  # no such folder; no such format
        raise ConfigError(f"cannot write {output}: {' '.join(str(error).split())}") from None
    finally:
        plt.close(figure)


def main() -> None:
    parser = Parser(prog="python -m tools.report", description="Draw the loss curves of runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="runs' folders")
    parser.add_argument("--output", type=Path, help="the picture (default: loss.png in the first run's folder)")
    arguments = parser.parse_args()
    records = [read_metrics(path) for path in arguments.runs]
    output: Path = arguments.output or arguments.runs[0] / "loss.png"
    draw(list(zip(labels(arguments.runs), records, strict=True)), output)
    print(f"loss curve: {output}")


if __name__ == "__main__":
    run(main)
