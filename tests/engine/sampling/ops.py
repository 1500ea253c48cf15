"""The sampler on what the tests' machine has: native kernels, or else numpy."""

from functools import partial

from engine.sampling import constraints, sampler
from model.backends.base import SamplingOps
from model.backends.cpu.kernels.library import load
from model.backends.cpu.sampling import NativeSampling
from model.backends.torch.sampling import TorchSampling

OPS: SamplingOps = NativeSampling() if load().native else TorchSampling()
sample = partial(sampler.sample, OPS)
constrained = partial(constraints.constrained, OPS)
