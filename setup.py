"""Packaging. lightning_megatron/patches is a link to the top-level folder patches/, so that both a checkout and an install have it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lightning_megatron/__init__.py").read_text("utf-8"))
README = ROOT / "README.md"

TRAIN = ["megatron-core[training]>=0.19,<0.20", "sentencepiece"]
DEMO = [*TRAIN, "matplotlib"]

setup(
    name="lightning-megatron",
    version=VERSION[1],
    description="Lightning Attention-2 layers for pretraining with NVIDIA megatron-core",
    long_description=README.read_text("utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["lightning_megatron", "lightning_megatron.*"]),
    python_requires=">=3.12",
    # No triton: every torch for Linux brings the one it was built with, sometimes under another name (NGC containers).
    install_requires=["torch>=2.6", "numpy"],
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "test": [*DEMO, "pytest", "ruff", "transformers"],
    },
    entry_points={"console_scripts": ["lightning-pretrain = lightning_megatron.pretrain:main"]},
)
