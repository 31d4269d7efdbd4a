"""MegaYOCO: 3D-parallel training of long-context decoder-decoder language models."""

__version__ = "0.1.0"
