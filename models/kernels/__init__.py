"""Fused kernels behind PyTorch operators: Triton's on a GPU, plain twins with the same numerics elsewhere.

An operator is the same in eager mode, under torch.compile, activation checkpointing and FSDP2, its backward is an
operator as well, and both are opaque to the compiler. Inside is fp32; what is rounded is what is stored. Gradients of
parameters are fp32 and the same every time. Triton is imported when the first kernel is launched.
"""

from models.kernels.cross_entropy import IGNORE, cross_entropy_, cross_entropy_twin
from models.kernels.dyt import add_dyt, dyt, dyt_e4m3, dyt_gradients
from models.kernels.fusing import fuse, is_watched
from models.kernels.launching import is_installed, is_interpreted, uses_triton
from models.kernels.rms import add_rms_norm, rms_norm, rms_norm_add, rms_norm_add_rms_norm
from models.kernels.rotary import rms_norm_rotate, rotate
from models.kernels.swiglu import silu_mul

__all__ = [
    "IGNORE",
    "add_dyt",
    "add_rms_norm",
    "cross_entropy_",
    "cross_entropy_twin",
    "dyt",
    "dyt_e4m3",
    "dyt_gradients",
    "fuse",
    "is_installed",
    "is_interpreted",
    "is_watched",
    "rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm",
    "rms_norm_rotate",
    "rotate",
    "silu_mul",
    "uses_triton",
]
