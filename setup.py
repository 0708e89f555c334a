"""Equipoise: pretraining where normalization is the subject of study."""

from setuptools import find_packages, setup

setup(
    name="equipoise",
    version="0.1.0",
    description="Distributed LLM pretraining for research on normalization (DyT, DNT) and optimization (mSGDW, AdamW)",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["models*", "pretrain*", "tools*", "launch*"]),
    package_data={"pretrain.data": ["austen/*"], "tools.harness": ["*.yaml"]},
    # Exact versions of everything, for a fresh machine: constraints.txt.
    install_requires=[
        "torch>=2.11,<2.14",  # tested on 2.13; FSDP2 with its state-dict API as of 2.11
        "numpy>=2",
        "pydantic>=2.11",  # strict type checks of the configuration tree, with the place of the mistake
        "pyyaml>=6",
        "safetensors>=0.6",  # weights in files of the outside world
        "tokenizers>=0.22",  # the tokenizers of imported models
        "protobuf>=5",  # what is in a sentencepiece model
        "sentencepiece>=0.2.1",  # trains and runs the tokenizers
        "datasets>=4",  # reads text, JSONL, Parquet and hub datasets, maps in parallel
        "rich>=14",  # progress bars
        "tensorboard>=2.19",
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.19.8"],  # the second engine: ZeRO
        "convert": ["gguf>=0.19"],  # llama.cpp's files, dequantized
        "fp8": ["torchao>=0.18"],  # float8 training of linears, kept by PyTorch
        "kernels": ["triton>=3.4"],  # fused kernels; PyTorch for CUDA brings its own
        "evaluate": [  # lm-evaluation-harness's tasks, and Hugging Face folders
            "lm_eval>=0.4.13",
            "accelerate>=1.15",  # its hf model imports it
            "transformers>=5",
        ],
        "report": [
            "matplotlib>=3.10",  # pictures of loss curves
            "scipy>=1.15",  # Student's t, for a study's intervals and tests
            "markdown>=3.7",  # a study's report as HTML
        ],
        "test": [
            "pytest>=9",
            "pytest-timeout>=2.4",
            "pytest-xdist>=3.8",  # the suite in two processes
            "hypothesis>=6.140",
            "transformers>=5",
            "matplotlib>=3.10",
            "scipy>=1.15",
            "markdown>=3.7",
            "lm_eval>=0.4.13",
            "accelerate>=1.15",
            "gguf>=0.19",
            "triton>=3.4; platform_system == 'Linux'",  # interpreted, and compiled for GPUs that are not there
        ],
        "lint": ["ruff>=0.17", "mypy>=2", "types-PyYAML"],
    },
)
