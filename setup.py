"""Packaging: three packages, four runtime dependencies; everything else is an extra."""

from pathlib import Path

from setuptools import setup

UI = ["tqdm>=4.60", "tensorboard>=2.14", "matplotlib>=3.7"]
TEST = ["pytest>=9.0", "transformers>=5.0", "peft>=0.20", *UI]

setup(
    name="llama-fsdp-finetuning",
    version="0.1.0",
    description="Llama 2 fine-tuning from scratch in PyTorch: LoRA and FSDP, proven against transformers and peft",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["llama", "peft_impl", "fsdp_train", "tools", "tools.benchmark"],
    package_data={"llama": ["py.typed"], "peft_impl": ["py.typed"], "fsdp_train": ["py.typed", "demo/**/*"]},
    install_requires=["torch>=2.11", "sentencepiece>=0.2", "safetensors>=0.5", "numpy>=1.26"],
    extras_require={
        "ui": UI,
        "test": TEST,
        "bench": ["transformers>=5.0", "peft>=0.20", "matplotlib>=3.7"],
        "dev": [*TEST, "ruff>=0.9", "mypy>=1.13", "pre-commit>=4.0"],
    },
)
