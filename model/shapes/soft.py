"""The shapes of soft mixtures, whose experts all have a weight: Soft MoE over a whole text, for encoders, and a causal
kind over segments, for decoders.

Frozen values that families build from a checkpoint's config.json; what no model can have is a ValueError.
"""

from dataclasses import dataclass
from typing import Literal

from model.shapes.checks import counts, one_of, sizes
from model.shapes.memory import StateMemory
from model.shapes.mixtures import MAX_EXPERTS, Activation, Router, TopK
from model.shapes.work import TokenWork

Restriction = Literal["renormalise", "drop"]  # of the weights, where not all experts run


@dataclass(frozen=True, slots=True)
class SoftSlots:
    """Soft MoE (arXiv 2308.00951): each of `experts` runs on `slots` mixtures of all tokens of a text, and each token
    takes a mixture of what they make. With a count K the K experts run that have most weight over the whole text."""

    experts: int
    slots: int  # of each expert
    width: int  # of an expert
    trained: int
    activation: Activation = "gelu"
    gated: bool = False
    restriction: Restriction = "renormalise"
    experts_per_draw = 0
    shared_experts = 0
    fixed = False
    draws_noise = False
    token_local = False
    memory = None  # a text is seen whole
    adaptive = False
    own_fields = ()
    rule_refusal = "a Soft MoE weighs slots, which are mixtures of all tokens: it takes a count alone"
    set_refusal = "a Soft MoE's slots are mixtures of all tokens, which expert sets do not know"

    def __post_init__(self) -> None:
        sizes(num_experts=self.experts, slots_per_expert=self.slots, width=self.width)
        _check(self.experts, self.trained, self.restriction)
        one_of("activation", self.activation, Activation)

    @property
    def num_experts(self) -> int:
        """All experts."""
        return self.experts

    @property
    def maximum(self) -> int:
        """All experts: Soft MoE as published."""
        return self.experts

    def token_work(self, width: int, count: float) -> TokenWork:
        """Logits, dispatch and combination. The experts run on slots, however many tokens there are: their work is
        counted as if there were as many tokens as slots."""
        mixing = 3 * self.experts * self.slots * width
        routed = count * (2 + self.gated) * width * self.width
        return TokenWork(self.experts * self.slots * width, routed, mixing + routed / self.experts)


@dataclass(frozen=True, slots=True)
class SoftSegments:
    """A causal soft mixture, after Lory (arXiv 2405.03133): the tokens of a segment of `segment` positions share the
    weights of `topk`'s experts, which follow from the mean of the segment before it. K experts of most weight run.

    Ours: the weights multiply what experts make, not their parameters; the first segment has the weights of its first
    token.
    """

    topk: TopK
    segment: int
    model_width: int  # of what the router reads
    experts_per_draw = 0
    shared_experts = 0
    fixed = False
    draws_noise = False
    token_local = False
    adaptive = False
    own_fields = ()
    rule_refusal = ""
    set_refusal = "its segments are routed as a whole, which expert sets do not know"

    def __post_init__(self) -> None:
        sizes(segment_length=self.segment, model_width=self.model_width)

    @property
    def num_experts(self) -> int:
        """All experts."""
        return self.topk.experts

    @property
    def trained(self) -> int:
        """As many as ran in training."""
        return self.topk.trained

    @property
    def maximum(self) -> int:
        """All experts: the full mixture."""
        return self.topk.experts

    @property
    def memory(self) -> StateMemory:
        """The sum of what the router has read of the segment so far, and the logits that its tokens share."""
        return StateMemory(self.model_width + self.topk.experts)

    def token_work(self, width: int, count: float) -> TokenWork:
        """The same as of a sparse mixture: the router runs once for a segment, not for every token."""
        return self.topk.token_work(width, count)


def segments(experts: int, width: int, trained: int, segment: int, model_width: int, **changes: object) -> SoftSegments:
    """With `restriction`, `activation` and `gated` among the changes, or as they are by default."""
    given = {"restriction": "renormalise", "activation": "silu", "gated": True} | changes
    restriction = given.pop("restriction")
    _check(experts, trained, restriction)
    router = Router(normalise=restriction == "renormalise")
    topk = TopK(experts=experts, width=width, trained=trained, router=router, **given)  # type: ignore[arg-type]
    return SoftSegments(topk, segment, model_width)


def _check(experts: int, trained: int, restriction: object) -> None:
    if experts > MAX_EXPERTS:
        raise ValueError(f"experts must be at most {MAX_EXPERTS}, got {experts}")
    counts(trained, experts)
    one_of("restriction", restriction, Restriction)
