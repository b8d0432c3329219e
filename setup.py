"""Packaging. The link lightning_megatron/patches makes the top-level folder patches/ a part of the package."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lightning_megatron/__init__.py").read_text("utf-8"))
README = ROOT / "README.md"

PACKAGES = find_packages(include=["lightning_megatron", "lightning_megatron.*"])
if "lightning_megatron.patches" not in PACKAGES:  # a checkout made without symbolic links, as Git on Windows does
    raise SystemExit("lightning_megatron/patches must be a symbolic link to ../patches: git config core.symlinks true")

TRAIN = ["megatron-core[training]>=0.19,<0.21", "sentencepiece"]
DEMO = [*TRAIN, "matplotlib"]
CONVERT = [TRAIN[0], "safetensors>=0.5", "tqdm"]
SERVE = [TRAIN[0], "hypercorn>=0.18", "msgpack", "pyzmq", "quart>=0.22"]
QUALITY = [*DEMO, "datasketch>=2"]  # examples/quality
OPTIMIZERS = ["absl-py", "einops", "emerging-optimizers>=0.3"]  # of Megatron-FSDP and muon
TEST = [
    *QUALITY,
    *CONVERT,
    *SERVE,
    *OPTIMIZERS,
    "httpx",
    "mypy",
    "openai",
    "pytest",
    "pytest-xdist",
    "ruff",
    "transformers",
]
DOCS = ["furo", "myst-parser", "sphinx"]

setup(
    name="lightning-megatron",
    version=VERSION[1],
    author="lightning_megatron contributors",
    description="Lightning Attention-2 layers for pretraining with NVIDIA megatron-core",
    long_description=README.read_text("utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords="linear attention, lightning attention, megatron, pretraining, long context, context parallelism, triton",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=PACKAGES,
    package_data={"lightning_megatron": ["py.typed"]},
    python_requires=">=3.12",
    # No triton: every torch for Linux brings the one it was built with, sometimes under another name (NGC containers).
    install_requires=["torch>=2.11", "numpy"],
    extras_require={
        "train": TRAIN,
        "demo": DEMO,
        "quality": QUALITY,
        "convert": CONVERT,
        "serve": SERVE,
        "test": TEST,
        "docs": DOCS,
        "dev": [*TEST, *DOCS, "pre-commit", "pre-commit-hooks"],
    },
    entry_points={
        "console_scripts": [
            "lightning-convert = lightning_megatron.convert.cli:main",
            "lightning-generate = lightning_megatron.inference.generate:main",
            "lightning-perplexity = lightning_megatron.inference.perplexity:main",
            "lightning-pretrain = lightning_megatron.pretrain:main",
            "lightning-serve = lightning_megatron.inference.serve:main",
        ]
    },
)
