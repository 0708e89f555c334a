"""A peer's minimal training script, for `tools.bench startup`: python -m tools.benching.first_step SETTINGS_AS_JSON

It imports what such a script imports, makes the model, and after its first step writes a file that says so.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.benching.loop import Loop, Windows


def main(settings: dict[str, Any]) -> None:
    """``settings``: peer, model (the builder's arguments), windows (of Loop's Windows, without the device), device,
    compiled, bf16, accumulation, and done, the file to write."""
    device = torch.device(settings["device"])
    compiled, arguments = settings["compiled"], settings["model"]
    if settings["peer"] == "hf":
        from tools.benching import huggingface

        model: nn.Module
        model, loss = huggingface.build(arguments, device, compiled)
        optimizer = huggingface.optimizer(model)
    else:
        from tools.benching import nanogpt

        model = nanogpt.NanoGPT(**arguments).to(device)
        loss = torch.compile(model) if compiled else model
        optimizer = nanogpt.optimizer(model, device)
    windows = Windows(Path(settings["file"]), **settings["windows"], device=device)
    loop = Loop(model, loss, optimizer, windows, device, accumulation=settings["accumulation"], bf16=settings["bf16"])
    loop.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    Path(settings["done"]).write_text("step 1\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
