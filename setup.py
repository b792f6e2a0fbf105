"""Package metadata, dependencies and entry points (tool settings live in pyproject.toml)."""

import re
from pathlib import Path

from setuptools import Distribution, find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "([^"]+)"', (ROOT / "nemo_bard/__init__.py").read_text(encoding="utf-8"), re.M)[1]
README = ROOT / "README.md"

# recipes/ and conf/ stay at the top of a checkout and become nemo_bard/recipes and nemo_bard/conf in a wheel;
# nemo_bard/base/paths.py finds them in both places.
SHIPPED = {f"nemo_bard.{name}": name for name in ("recipes", "conf") if any((ROOT / name).rglob("*.yaml"))}

DEMO = ["matplotlib>=3.7", "scikit-learn>=1.3"]
TRACKERS = ["mlflow-skinny>=3.16.1", "wandb>=0.30"]
SERVE = ["fastapi>=0.115", "prometheus-client", "uvicorn>=0.30"]


class DataInEditable(Distribution):
    """Makes editable wheels carry ``data_files`` as wheels do: setuptools asks for ``has_data`` and lacks it."""

    def has_data(self) -> bool:
        """Whether ``install_data`` has something to install."""
        return self.has_data_files()


setup(
    distclass=DataInEditable,
    name="nemo-bard",
    version=VERSION,
    description="Block-diffusion vision-language models (BARD) for NVIDIA NeMo AutoModel",
    long_description=README.read_text(encoding="utf-8") if README.is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["nemo_bard", "nemo_bard.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "nemo_bard.launch": ["job.sbatch"],
        "nemo_bard.serving.server": ["page/*"],
        **{name: ["*.yaml", "**/*.yaml"] for name in SHIPPED},
    },
    # Relative to <name>.data/data inside a wheel, hence <name>.data/purelib: both wheels and editable wheels put the
    # start-up hook into site-packages this way, without a custom build command. Why a hook: docs/decisions.md.
    data_files=[("../purelib", ["nemo_bard/nemo_bard_automodel.pth"])],
    install_requires=[
        "nemo-automodel>=0.7,<0.8",  # why no later one: docs/decisions.md, "upstream in one room"
        "torch>=2.8",
        "torchvision",
        "transformers>=5.18",
        "triton<3.9; sys_platform == 'linux'",  # nemo-automodel 0.7.0 fails to import with triton 3.9
        "av",  # decodes videos
        "datasets",  # reads and writes Arrow files
        "hydra-core>=1.3",
        "megatron-core>=0.16",
        "numpy",
        "omegaconf>=2.3",
        "packaging",
        "pillow>=11.3",  # reads AVIF
        "pyarrow",
        "pyyaml",
        "qwen-vl-utils>=0.0.14",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        "demo": DEMO,
        "mixture": [],  # what it named is always installed; the name stays for commands that have it
        "mlflow": ["nemo-automodel[mlflow]"],
        "serve": SERVE,
        "trackers": ["nemo-automodel[mlflow,wandb]"],
        "video": [],  # likewise
        "wandb": ["nemo-automodel[wandb]"],
        "dev": [
            *DEMO,
            *SERVE,
            *TRACKERS,  # enough for MLflow's store of files; its extra also brings what a database needs
            "httpx2",  # benchmarks/serve.py; transformers brings it too
            "import-linter>=2.0",
            "openai",  # tests of the local server
            "playwright",  # tests of its page, with a Chromium of the system
            "pre-commit",
            "pyright[nodejs]",
            "pytest>=8",
            "pytest-xdist",
            "ruff",
            "wheel",
        ],
    },
    entry_points={
        "console_scripts": [
            "automodel = nemo_bard.cli:automodel",
            "nemo-bard = nemo_bard.cli:main",
        ],
        "lmms_eval.models": ["bard_vl = nemo_bard.evaluation.harness:manifest"],
        "nemo_automodel.architectures": [
            "BardVLForConditionalGeneration = nemo_bard.model:BardVLForConditionalGeneration",
        ],
        "vllm.general_plugins": [
            "bard_vl = nemo_bard.serving.vllm:register",
        ],
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
