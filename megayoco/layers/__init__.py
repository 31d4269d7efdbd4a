"""Tensor-parallel modules: one mixer per file, and what they remember."""

import megayoco.parallel  # noqa: F401  # first, so that megatron-core's warnings at import stay silent
