"""Models for Hugging Face transformers: YOCO, and LLaMA with memory (LongLLaMA). Their files are copied into exported
folders and need nothing else.

Nothing here imports transformers, which training does not require; the files do.
"""

from __future__ import annotations

from pathlib import Path

CODE_FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_megayoco.py", "modeling_megayoco.py"))
"""What an exported folder of a YOCO holds beside weights and config.json, under these names."""

LONGLLAMA_CODE_FILES = tuple(
    Path(__file__).with_name(f"{name}_longllama.py") for name in ("configuration", "cache", "modeling")
)
"""The same of a LLaMA with memory."""
