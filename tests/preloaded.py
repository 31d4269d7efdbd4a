"""What every test worker needs, imported once by the server that forks them: it takes seconds."""

import deepspeed  # noqa: F401
import torch  # noqa: F401

import megayoco.train.loop
import megayoco.train.session  # noqa: F401
