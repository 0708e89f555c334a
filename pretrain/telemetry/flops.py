"""Model FLOPs and their utilization, by the rule that PaLM, torchtitan and most published numbers use."""

from __future__ import annotations


def flops_per_token(matmul_parameters: int, depth: int, width: int, sequence_length: int) -> int:
    """Floating-point operations that training on one token takes, forward and backward.

    ::

        6 · N  +  12 · depth · width · sequence_length          (PaLM, arXiv 2204.02311, appendix B)

    A multiply and an add for each of the N parameters in a matrix product, once forward and twice backward; then
    for each layer the same for QKᵀ and for its product with V, 2 · sequence_length · width each. N leaves out the
    embedding lookup and learned positions, which multiply nothing, and counts the head even where it shares the
    embedding's weight. ``width`` is heads times head width. A causal mask is no discount, and recomputation by
    activation checkpointing no bonus: both would make runs incomparable.
    """
    return 6 * matmul_parameters + 12 * depth * width * sequence_length


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops: float | None, devices: int) -> float | None:
    """Model FLOPs utilization, the share of the devices' peak that the model's own arithmetic uses.

    ``tokens_per_second`` is of all devices together, ``peak_flops`` the FLOP/s of one of them (telemetry.devices).
    None if the peak is unknown.
    """
    if peak_flops is None:
        return None
    return tokens_per_second * flops_per_token / (peak_flops * devices)
