"""Packaging of MegaYOCO. The requirements stand here once: tools/environment.py reads them from this file too."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# Minimum versions only; constraints.txt pins the versions that were tested together.
REQUIRES = [
    "deepspeed>=0.19",
    "hjson>=3.1",
    "matplotlib>=3.9",
    "megatron-core>=0.16",
    "msgpack>=1.0",
    "numpy>=2.0",
    "orjson>=3.10",
    "psutil>=5.9",
    "pyarrow>=18.0",
    "pydantic>=2.9",
    "pyyaml>=6.0",
    "regex>=2024.5",
    "rich>=13.0",
    "safetensors>=0.5",
    "sentencepiece>=0.2",
    "tensorboard>=2.18",
    "tiktoken>=0.13",
    "tokenizers>=0.21",
    "torch>=2.11",
    "tqdm>=4.66",
    "transformers>=5.0",
    # megatron-core imports it from 0.19 on, GPU or not; 0.19 needs Python 3.12
    'triton>=3.4; python_version >= "3.12" and platform_system == "Linux"',
    "zstandard>=0.23",
]
EVAL = ["lm-eval>=0.4.12"]
FAISS = ["faiss-cpu>=1.9"]
TEST = [*EVAL, *FAISS, "hypothesis>=6.100", "pytest>=8.0", "pytest-timeout>=2.3"]
EXTRAS = {
    "test": TEST,
    "dev": [*TEST, "mypy>=1.15", "ruff>=0.12", "types-PyYAML"],
    "gpu": ["flash-attn>=2.7", "flash-linear-attention>=0.4", "liger-kernel>=0.5"],
    "faiss": FAISS,
    "eval": EVAL,
    "mpi": ["mpi4py>=4.0"],
}


def version() -> str:
    """`__version__` of the package, read as text: importing it would need its dependencies."""
    text = (ROOT / "megayoco" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('megayoco/__init__.py has no line __version__ = "..."')
    return match.group(1)


def main() -> None:
    # Imported here, so that REQUIRES and EXTRAS can be read where setuptools is not installed.
    from setuptools import find_packages, setup

    setup(
        name="megayoco",
        version=version(),
        description="3D-parallel training of long-context decoder-decoder language models (YOCO) with DeepSpeed",
        long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.10",
        packages=find_packages(include=["megayoco", "megayoco.*"]),
        package_data={"megayoco": ["py.typed", "evaluate/tasks/*"]},
        install_requires=REQUIRES,
        extras_require=EXTRAS,
        classifiers=[
            "Intended Audience :: Science/Research",
            "Operating System :: POSIX",
            "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Artificial Intelligence",
        ],
    )


if __name__ == "__main__":
    main()
