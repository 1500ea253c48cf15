"""Every test computes on one thread of torch's: its waiting threads spin, which slows whatever runs beside them."""

import torch

from model.kernels.library import load

load()  # the kernels' own threads are as many as torch's were
torch.set_num_threads(1)
