"""Sample text from a run's newest checkpoint.

python -m tools.generate runs/tiny --prompt "It is a truth" --tokens 200
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from models.errors import ConfigError
from models.generation import sample
from tools.command import run
from tools.loading import load_run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description="Sample text from a run.")
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--prompt", default="", help="text to go on from; empty: the start of a document")
    parser.add_argument("--tokens", type=int, default=120, help="how many to add (default 120)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of the probability to sample from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default cpu)")
    arguments = parser.parse_args()
    if arguments.tokens < 1:
        raise ConfigError(f"--tokens is {arguments.tokens}: write a positive number")
    if not arguments.temperature >= 0:
        raise ConfigError(f"--temperature is {arguments.temperature}: write 0 or more")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p is {arguments.top_p}: write a share above 0, at most 1")
    if not 0 <= arguments.seed < 2**63:
        raise ConfigError(f"--seed is {arguments.seed}: write a number from 0 to {2**63 - 1}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but no GPU is visible here; write cpu")

    device = torch.device(arguments.device)
    trained = load_run(arguments.run, device)
    prompt = trained.tokenizer.encode(arguments.prompt) or [trained.tokenizer.eos]
    tokens = sample(
        trained.model,
        torch.tensor([prompt], device=device),
        arguments.tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        pieces=trained.tokenizer.size,
        generator=torch.Generator(device).manual_seed(arguments.seed),
    )
    print(trained.tokenizer.decode(tokens[0].tolist()))


if __name__ == "__main__":
    run(main)
