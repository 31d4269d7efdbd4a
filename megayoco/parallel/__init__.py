"""Process groups, collectives and shards: the only package that knows ranks."""

import warnings

with warnings.catch_warnings():
    # megatron-core warns at import about every optional package it goes without; none matters here
    warnings.simplefilter("ignore")
    import megatron.core.tensor_parallel  # noqa: F401
