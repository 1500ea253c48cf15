"""The shape of one level of a deep mixture of experts.

A frozen value that families build from a checkpoint's config.json; what no model can have is a ValueError.
"""

from dataclasses import dataclass

from model.shapes.checks import counts, one_of, sizes
from model.shapes.feed_forward import TokenLocal
from model.shapes.mixtures import MAX_EXPERTS
from model.shapes.soft import Restriction
from model.shapes.work import TokenWork


@dataclass(frozen=True, slots=True)
class DeepLevel(TokenLocal):
    """A level of a Deep MoE (arXiv 1312.4314): every expert has a weight, by a gate of two layers. K experts of most
    weight run; at K = all the level is the published one.

    Levels may have different numbers of experts. `most` is the largest of them, and so the largest count: for a level
    of fewer experts it means all of them.
    """

    experts: int
    width: int  # of an expert, and of the level's output before it is brought back to the model's width
    gate_width: int
    most: int
    even: bool = True  # whether all levels have `most` experts
    bias: bool = True
    restriction: Restriction = "renormalise"
    experts_per_draw = 0
    shared_experts = 0
    fixed = False
    own_fields = ()

    def __post_init__(self) -> None:
        sizes(num_experts=self.experts, intermediate_size=self.width, gate_intermediate_size=self.gate_width)
        if self.most > MAX_EXPERTS:
            raise ValueError(f"experts must be at most {MAX_EXPERTS}, got {self.most}")
        counts(self.experts, self.most)
        one_of("restriction", self.restriction, Restriction)

    @property
    def num_experts(self) -> int:
        """All experts of the level."""
        return self.experts

    @property
    def trained(self) -> int:
        """All experts run in training."""
        return self.most

    @property
    def maximum(self) -> int:
        """All experts of the largest level."""
        return self.most

    @property
    def adaptive(self) -> bool:
        """Whether a count can be more than what runs."""
        return not self.even

    @property
    def rule_refusal(self) -> str:
        """A rule's numbers mean one number of experts."""
        return "" if self.even else "levels of different numbers of experts take counts alone"

    def token_work(self, width: int, count: float) -> TokenWork:
        """The gate, the experts that run, and the map back."""
        shared = self.gate_width * (width + self.experts) + self.width * width
        routed = min(count, self.experts) * self.width * width
        return TokenWork(shared, routed, shared + routed)
