"""The YOCO model for Hugging Face transformers: two files that are copied into exported folders and need nothing else.

Nothing here imports transformers, which training does not require; the two files do.
"""

from __future__ import annotations

from pathlib import Path

CODE_FILES = tuple(Path(__file__).with_name(name) for name in ("configuration_megayoco.py", "modeling_megayoco.py"))
"""What an exported folder holds beside weights and config.json, under these names."""
