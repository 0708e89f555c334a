"""Speed and memory of a conversion, beside a plain copy of the same bytes on the same disk in the same run.

    python -m tests.tools.convert_cost --billions 7 --folder /tmp

A LLaMA of random bf16 weights in shards of 1 GB is made, copied, and converted by a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from models import ModelConfig
from tests.runs import ONE_THREAD, REPOSITORY
from tools.formats.huggingface import stock_config
from tools.formats.lazy import LazyTensor
from tools.formats.names import to_llama
from tools.formats.weights import parameter_shapes

SIZES = {  # billions -> width, depth, heads, ffn width
    7.0: (4096, 32, 32, 11008),
    3.0: (3200, 26, 32, 8640),
    0.2: (1024, 12, 16, 2816),
}
_CONVERT = """
import json, sys, time
from pretrain.telemetry.throughput import peak_resident_bytes
from tools import convert
started = time.monotonic()
convert.main(sys.argv[1:])
seconds = time.monotonic() - started
print(json.dumps({"seconds": seconds, "peak": peak_resident_bytes()}))
"""


class Cost(NamedTuple):
    bytes: int
    copy_seconds: float
    convert_seconds: float
    peak_bytes: int

    @property
    def relative_speed(self) -> float:
        return self.copy_seconds / self.convert_seconds


def make(folder: Path, billions: float, shard_bytes: int) -> int:
    """A Hugging Face folder of that size; returns the bytes of its weights. The headers are written by hand."""
    width, depth, heads, ffn_width = SIZES[billions]
    config = ModelConfig("llama", width=width, depth=depth, heads=heads, ffn_width=ffn_width, vocab_size=32000)
    named = {name: LazyTensor(shape, None, None) for name, shape in parameter_shapes(config).items()}  # type: ignore[arg-type]
    shapes = {name: tensor.shape for name, tensor in to_llama(named).items()}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if 2 * sum(map(_count, shards[-1].values())) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32).view(np.uint32) >> 16  # bf16
    values = memoryview(noise.astype(np.uint16)).cast("B")
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        end, header = 0, {}
        for name, shape in shard.items():
            begin, end = end, end + 2 * _count(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            while end:
                end -= out.write(values[:end])
            out.flush()
            os.fsync(out.fileno())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(stock_config(config, "LlamaForCausalLM")))
    return 2 * sum(map(_count, shapes.values()))


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def measure(folder: Path, billions: float, shard_bytes: int, target: str, rounds: int = 1) -> Cost:
    """The best of some rounds, in which copy and conversion take turns. ``folder`` must not exist."""
    size = make(folder / "model", billions, shard_bytes)
    costs = []
    for _ in range(rounds):
        copied = _copy(folder / "model", folder / "copy")
        os.sync()  # what others have written is theirs to wait for
        options = [str(folder / "model"), str(folder / "out"), "--to", target]
        command = [sys.executable, "-c", _CONVERT, *options]
        done = subprocess.run(command, cwd=REPOSITORY, env=ONE_THREAD, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(folder / "out")
        costs.append(Cost(size, copied, found["seconds"], found["peak"]))
    best = min(costs, key=lambda cost: cost.convert_seconds)
    return best._replace(copy_seconds=min(cost.copy_seconds for cost in costs))


def _copy(source: Path, destination: Path) -> float:
    """Seconds until the disk has it."""
    os.sync()
    started = time.monotonic()
    destination.mkdir()
    for path in source.iterdir():
        with path.open("rb") as original, (destination / path.name).open("wb") as copy:
            shutil.copyfileobj(original, copy, 1 << 24)
            copy.flush()
            os.fsync(copy.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(destination)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.convert_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--billions", type=float, choices=list(SIZES), default=7.0)
    parser.add_argument(
        "--folder", type=Path, required=True, help="on the disk to measure; needs twice the model's size"
    )
    parser.add_argument("--to", default="safetensors")
    arguments = parser.parse_args()
    place = arguments.folder / "convert-cost"
    try:
        cost = measure(place, arguments.billions, 10**9, arguments.to)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(
        f"{cost.bytes / 1e9:.1f} GB to {arguments.to}: copied in {cost.copy_seconds:.0f} s, converted in "
        f"{cost.convert_seconds:.0f} s ({cost.relative_speed:.0%} of the copy's speed), "
        f"peak memory {cost.peak_bytes / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
