"""One thread for each of the processes that share a machine, and those that they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
