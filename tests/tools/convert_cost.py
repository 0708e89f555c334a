"""Speed and memory of a conversion, beside plain copies on the same disk in the same run: of the bytes that it reads
and of those that it writes, which differ where the dtype does.

    python -m tests.tools.convert_cost --billions 7 --folder /tmp

A LLaMA of random bf16 weights in shards of 1 GB is made, copied, and converted by a process of its own, and what that
wrote is copied too.
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
from tools.convert import TARGETS
from tools.formats.huggingface import stock_config
from tools.formats.lazy import LazyTensor
from tools.formats.names import to_llama
from tools.formats.weights import parameter_shapes

SIZES = {  # billions -> width, depth, heads, ffn width
    7.0: (4096, 32, 32, 11008),
    3.0: (3200, 26, 32, 8640),
    1.0: (2048, 16, 16, 5632),
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
    """Bytes and seconds: of the source and its copy, of the result and its copy, and of the conversion."""

    read_bytes: int
    read_copy: float
    written_bytes: int
    written_copy: float
    seconds: float
    peak_bytes: int  # of the converting process's memory


def make(folder: Path, billions: float, shard_bytes: int) -> None:
    """A Hugging Face folder of that size. The headers are written by hand."""
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


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def measure(folder: Path, billions: float, shard_bytes: int, target: str, source: str = "hf", rounds: int = 1) -> Cost:
    """The best of some rounds, in which copies and conversion take turns. ``folder`` must not exist."""
    model, out = folder / "model", folder / "out"
    make(model, billions, shard_bytes)
    if source == "native":
        _convert(model, folder / "run", "native")
        shutil.rmtree(model)
        model = folder / "run"
    costs = []
    for left in reversed(range(rounds)):
        read_bytes, read_copy = _bytes(model), _copy(model, folder / "copy")
        os.sync()  # what others have written is theirs to wait for
        seconds, peak = _convert(model, out, target)
        if not left:  # room for the last copy
            shutil.rmtree(model)
        costs.append(Cost(read_bytes, read_copy, _bytes(out), _copy(out, folder / "copy"), seconds, peak))
        shutil.rmtree(out)
    return Cost(*(min(values) for values in zip(*costs, strict=True)))._replace(
        peak_bytes=max(c.peak_bytes for c in costs)
    )


def _convert(source: Path, destination: Path, target: str) -> tuple[float, int]:
    """Seconds, and the process's largest memory."""
    command = [sys.executable, "-c", _CONVERT, str(source), str(destination), "--to", target, "--allow-pickle"]
    done = subprocess.run(command, cwd=REPOSITORY, env=ONE_THREAD, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found["seconds"], found["peak"]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _copy(source: Path, destination: Path) -> float:
    """Seconds until the disk has it."""
    os.sync()
    started = time.monotonic()
    for path in source.rglob("*"):
        copy = destination / path.relative_to(source)
        if path.is_dir():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as original, copy.open("wb") as file:
            shutil.copyfileobj(original, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(destination)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.convert_cost", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--billions", type=float, choices=list(SIZES), default=7.0)
    add("--folder", type=Path, required=True, help="on the disk to measure; needs room for the result twice")
    add("--from", dest="source", choices=("hf", "native"), default="hf", help="what is converted (default hf)")
    add("--to", choices=TARGETS, default="safetensors")
    add("--rounds", type=int, default=1, help="of which the best counts (default 1)")
    arguments = parser.parse_args()
    place = arguments.folder / "convert-cost"
    try:
        cost = measure(place, arguments.billions, 10**9, arguments.to, arguments.source, arguments.rounds)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(
        f"{arguments.source} to {arguments.to}: {cost.seconds:.1f} s, peak memory {cost.peak_bytes / 1e9:.2f} GB\n"
        f"  {cost.read_copy / cost.seconds:.0%} of the speed of copying the {cost.read_bytes / 1e9:.1f} GB it reads "
        f"({cost.read_copy:.1f} s)\n"
        f"  {cost.written_copy / cost.seconds:.0%} of the speed of copying the {cost.written_bytes / 1e9:.1f} GB it "
        f"writes ({cost.written_copy:.1f} s)"
    )


if __name__ == "__main__":
    main()
