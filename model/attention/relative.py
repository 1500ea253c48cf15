"""T5's relative position bias (arXiv 1910.10683 §2.1): from a table of buckets to values by distance."""

import math

import torch
from torch import Tensor

from model.shapes.encoder import RelativeBias
from model.step import DistanceBias


def distance_bias(table_NH: Tensor, shape: RelativeBias, causal: bool) -> DistanceBias:
    """The bias of every distance that has a value of its own, from the table's N buckets."""
    least = 0 if causal else -shape.distance
    distance_X = torch.arange(least, shape.distance + 1)
    bucket_X = buckets(distance_X, shape, causal).to(table_NH.device)
    return DistanceBias(table_NH[bucket_X].T, least)


def buckets(distance_X: Tensor, shape: RelativeBias, causal: bool) -> Tensor:
    """The bucket of each distance, query - key. Where later keys are seen too, the second half of the buckets is
    theirs."""
    if causal:
        return _sized(distance_X.clamp(min=0), shape.buckets, shape.distance)
    half = shape.buckets // 2
    return _sized(distance_X.abs(), half, shape.distance) + half * (distance_X < 0)


def _sized(length_X: Tensor, count: int, longest: int) -> Tensor:
    """Half of `count` buckets for a length each, the others on a logarithmic scale up to `longest`."""
    exact = count // 2
    grown_X = torch.log(length_X.float() / exact) / math.log(longest / exact) * (count - exact)
    far_X = (exact + grown_X.clamp(min=0).long()).clamp(max=count - 1)
    return torch.where(length_X < exact, length_X, far_X)
