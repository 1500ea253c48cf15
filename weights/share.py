"""The part of a checkpoint that one rank loads: on rank 0 all but the other ranks' experts, elsewhere experts alone.

It narrows an empty decoder and what fills it; reading is `weights/load.py`'s work.
"""

from dataclasses import replace

import torch
from torch import nn

from model.errors import CheckpointError
from model.moe.topk import TopKMixture
from model.ranks.share import Share
from weights.rules import TensorPart

STACKS = ("gate_up", "down", "gate_up_bias", "down_bias")  # parameters of a mixture with a slice per expert
FillPlan = dict[str, tuple[TensorPart, ...]]  # what each parameter is filled from


def narrowed(model: nn.Module, plan: FillPlan, share: Share) -> FillPlan:
    """Take from a model on the meta device what the rank does not hold, and from the plan what fills that.

    Raises:
        CheckpointError: several experts are stored in a way that cannot be divided.
    """
    mixtures, kept = mixtures_of(model), FillPlan()
    for target, parts in plan.items():
        place, _, name = target.rpartition(".")
        module = model.get_submodule(place)
        if module in mixtures and name in STACKS:
            parameter = model.get_parameter(target)
            own = share.experts(len(parameter))
            shape = (len(own), *parameter.shape[1:])
            empty = torch.empty(shape, dtype=parameter.dtype, device="meta")
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
            kept[target] = tuple(_moved(part, own) for part in parts if _holds(part, own))
        elif share.rank:
            setattr(module, name, None)
        else:
            kept[target] = parts
    return kept


def mixtures_of(model: nn.Module) -> list[TopKMixture]:
    """The mixtures of a decoder, in the order of its layers."""
    return [module for module in model.modules() if isinstance(module, TopKMixture)]


def expert_bytes(model: nn.Module) -> int:
    """Bytes of the experts that a decoder holds."""
    stacks = (getattr(mixture, name, None) for mixture in mixtures_of(model) for name in STACKS)
    return sum(stack.numel() * stack.element_size() for stack in stacks if stack is not None)


def _holds(part: TensorPart, own: range) -> bool:
    """Whether some of the part belongs to these experts."""
    return not part.index or isinstance(part.index[0], slice) or part.index[0] in own


def _moved(part: TensorPart, own: range) -> TensorPart:
    """The part in a parameter that holds these experts alone."""
    match part.index:
        case ():
            return replace(part, rows=own)
        case (int(expert), *within):
            return replace(part, index=(expert - own.start, *within))
    raise CheckpointError(f"{part.source} holds some rows of several experts, which ranks cannot divide")
