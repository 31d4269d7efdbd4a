"""What every test worker needs, imported once by the server that forks them: it takes seconds."""

import gc

import deepspeed  # noqa: F401
import torch  # noqa: F401

import megayoco.train.loop
import megayoco.train.session  # noqa: F401

# the workers collect after every case: a million objects of the libraries need not be walked, nor their pages copied
gc.collect()
gc.freeze()
