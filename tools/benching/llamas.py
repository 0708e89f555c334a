"""LLaMA as other libraries have it, of the sizes of a configuration: their own model code and loss, not ours.

Each is a module and the loss of inputs and targets as that library's own training script computes it, compiled as
the script compiles. transformers: Trainer, which casts by autocast and compiles the whole model. litgpt: its
pretrain.py, which compiles the model and leaves the loss, in chunks of 128 tokens, outside. torchtitan: its trainer,
which compiles every block.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import ModelConfig
from models.errors import ConfigError
from tools.benching import huggingface
from tools.formats.huggingface import stock_config

_TORCHTITAN = "pip install --no-deps torchtitan spmd_types torchdata tyro torch_checkpointing"
Loss = Callable[[Tensor, Tensor], Tensor]
_LITGPT = "pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse docstring-parser"


def llama_sizes(config: ModelConfig, length: int) -> ModelConfig:
    """The plain LLaMA of the sizes of ``config``, for sequences of ``length`` tokens."""
    return ModelConfig(
        plan="llama",
        trunk="llama",
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        kv_heads=config.kv_heads,
        ffn_width=config.ffn_width if config.trunk == "llama" else None,
        vocab_size=config.vocabulary,
        context=length,
        tied=config.is_tied,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
    )


def huggingface_settings(sizes: ModelConfig) -> dict[str, Any]:
    """LlamaConfig's arguments for a LLaMA of ours."""
    known = stock_config(sizes, "LlamaForCausalLM")
    return {key: value for key, value in known.items() if key not in ("architectures", "model_type")}


def of_huggingface(sizes: ModelConfig, device: torch.device, compiled: bool) -> tuple[nn.Module, Loss]:
    """transformers' LlamaForCausalLM."""
    _module("hf", "transformers", "pip install transformers")
    return huggingface.build(huggingface_settings(sizes), device, compiled)


def of_litgpt(sizes: ModelConfig, device: torch.device, compiled: bool) -> tuple[nn.Module, Loss]:
    """litgpt's GPT in its LLaMA shape."""
    config = _module("litgpt", "litgpt.config", _LITGPT).Config(
        name="llama",
        block_size=sizes.context,
        n_layer=sizes.depth,
        n_embd=sizes.width,
        n_head=sizes.heads,
        n_query_groups=sizes.key_value_heads,
        head_size=sizes.head_width,
        vocab_size=sizes.vocabulary,
        padded_vocab_size=sizes.vocabulary,
        norm_class_name="RMSNorm",
        norm_eps=sizes.norm_eps,
        parallel_residual=False,
        rope_base=int(sizes.rope_theta),
        rotary_percentage=1.0,
        mlp_class_name="LLaMAMLP",
        intermediate_size=sizes.feedforward_width,
        bias=False,
    )
    with device:
        model = _module("litgpt", "litgpt.model", _LITGPT).GPT(config)
    model.apply(model._init_weights)
    if sizes.is_tied:
        model.transformer.wte.weight = model.lm_head.weight
    run: Any = torch.compile(model) if compiled else model
    cross_entropy = _module("litgpt", "litgpt.utils", _LITGPT).chunked_cross_entropy
    return model, lambda inputs, targets: cross_entropy(run(inputs), targets)


def of_torchtitan(sizes: ModelConfig, device: torch.device, compiled: bool) -> tuple[nn.Module, Loss]:
    """torchtitan's Llama3Model (0.3), attention by its varlen kernel, which takes bf16 alone. Autocast stands in for
    the casting of its FSDP."""
    if device.type != "cuda":
        raise ConfigError(
            "--against torchtitan: its attention, FlexAttention or a varlen kernel, has no backward on a CPU: "
            "write hf, litgpt or nanogpt"
        )
    model = torchtitan_model(sizes, device)
    blocks: Any = model.get_submodule("layers")
    for block in blocks.values() if compiled else ():
        block.compile(fullgraph=True)
    masks: dict[torch.Size, tuple[Tensor, Any]] = {}

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        if inputs.shape not in masks:  # which its own trainer makes for each batch
            positions = torch.arange(inputs.shape[1], device=device).expand(inputs.shape)
            masks[inputs.shape] = positions, model.get_attention_masks(positions)
        positions, mask = masks[inputs.shape]
        logits = model(inputs, positions=positions, attention_masks=mask)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    return model, loss


def torchtitan_model(sizes: ModelConfig, device: torch.device) -> Any:
    """Its Llama3Model, with first weights; fp32."""
    llama3 = _module("torchtitan", "torchtitan.models.llama3", _TORCHTITAN)
    common = _module("torchtitan", "torchtitan.models.common", _TORCHTITAN)
    width, vocabulary = sizes.width, sizes.vocabulary
    config = llama3.Llama3Model.Config(
        dim=width,
        vocab_size=vocabulary,
        enable_weight_tying=sizes.is_tied,
        tok_embeddings=common.Embedding.Config(
            num_embeddings=vocabulary,
            embedding_dim=width,
            param_init=llama3._EMBEDDING_SKIP_INIT if sizes.is_tied else llama3._EMBEDDING_INIT,
        ),
        norm=common.RMSNorm.Config(normalized_shape=width, eps=sizes.norm_eps, param_init=llama3._NORM_INIT),
        lm_head=common.Linear.Config(
            in_features=width, out_features=vocabulary, param_init=llama3._output_linear_init(width)
        ),
        layers=llama3._build_llama3_layers(
            fuse_qkv=True,
            n_layers=sizes.depth,
            dim=width,
            n_heads=sizes.heads,
            n_kv_heads=sizes.key_value_heads,
            hidden_dim=sizes.feedforward_width,
            rope=common.ComplexRoPE.Config(dim=sizes.head_width, max_seq_len=sizes.context, theta=sizes.rope_theta),
            attn_backend="varlen",
        ),
    )
    with device:
        model = config.build()
        model.init_states(buffer_device=device)
    return model


LLAMAS: dict[str, Callable[[ModelConfig, torch.device, bool], tuple[nn.Module, Loss]]] = {
    "hf": of_huggingface,
    "litgpt": of_litgpt,
    "torchtitan": of_torchtitan,
}


def _module(peer: str, name: str, install: str) -> Any:
    """A module of a package that is there for comparison alone.

    By its name, because the packages' own requirements contradict ours (litgpt wants huggingface-hub below 1.4,
    transformers 5 above it): they cannot be declared beside ours.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"--against {peer}: {error}: {install}") from None
