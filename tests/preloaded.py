"""What every test worker needs, imported once by the server that forks them: it takes seconds."""

import functools
import gc

import deepspeed  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import numpy.ma  # noqa: F401
import torch  # noqa: F401

import megayoco.train.loop
import megayoco.train.session  # noqa: F401
from megayoco.train import metrics

# every start of a run measures the processors for most of a second; no test reads the share of it that is reached
metrics.measured_matmul = functools.partial(metrics.measured_matmul, seconds=0.002)  # type: ignore[assignment]

# the workers collect after every case: a million objects of the libraries need not be walked, nor their pages copied
gc.collect()
gc.freeze()
