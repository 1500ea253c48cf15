"""`FeedForward`: the properties that every shape of a feed-forward layer has, dense or a mixture of experts.

A shape has the properties of its kind, so that neither the decoder nor the engine distinguishes kinds. The kinds are in
`model/shapes/mixtures.py` and in files of their own.
"""

from typing import Protocol

from model.shapes.memory import Memory
from model.shapes.work import TokenWork


class FeedForward(Protocol):
    """The properties of a layer's feed-forward shape that the decoder and the engine read."""

    @property
    def num_experts(self) -> int:
        """Experts that a token chooses among (∞-MoE: groups of units); 0 for a dense layer, which has no count."""

    @property
    def experts_per_draw(self) -> int:
        """How many of them one draw uses; 0 where nothing is drawn and each routed pair uses one."""

    @property
    def trained(self) -> int:
        """The expert count of the checkpoint's training."""

    @property
    def maximum(self) -> int:
        """The largest expert count that can be served."""

    @property
    def fixed(self) -> bool:
        """Whether the layer is defined for the trained count only."""

    @property
    def rule_refusal(self) -> str:
        """Why it takes no `RoutingRule` but its own (repair, kept and `own_fields` aside); empty: it takes them."""

    @property
    def set_refusal(self) -> str:
        """Why a request, or a smaller checkpoint, cannot keep some of its experts alone; empty: it can."""

    @property
    def own_fields(self) -> tuple[str, ...]:
        """The fields of `RoutingRule` that it takes and other kinds do not (`OWN_FIELDS` in `model/budget.py`)."""

    @property
    def adaptive(self) -> bool:
        """Whether a count is an upper bound, and how many experts run depends on the token under every rule. Such a
        layer always reports to the observer how many each token used."""

    @property
    def shared_experts(self) -> int:
        """Experts that run for every token and are no part of the count."""

    @property
    def draws_noise(self) -> bool:
        """Whether the request's noise seed changes the output, and so belongs to the prefix cache's key."""

    @property
    def token_local(self) -> bool:
        """Whether a token's output depends on that token only, not on others of its sequence."""

    @property
    def memory(self) -> Memory | None:
        """What is kept of a running sequence between steps, if anything.

        A kind that is not token-local and keeps nothing must see a prompt whole: its prompts are not cut into chunks.
        """

    def token_work(self, width: int, count: float) -> TokenWork:
        """The weights and multiplications of one token with this count (on average), in a decoder of this width."""


class TokenLocal:
    """Defaults for a kind whose tokens do not depend on each other: no state of a sequence, no noise, no routing
    rules."""

    __slots__ = ()
    memory = None

    @property
    def token_local(self) -> bool:
        """True: a token's output depends on that token only."""
        return True

    @property
    def own_fields(self) -> tuple[str, ...]:
        """None by default."""
        return ()

    @property
    def adaptive(self) -> bool:
        """False: a token runs as many experts as its count."""
        return False

    @property
    def draws_noise(self) -> bool:
        """False: nothing is drawn."""
        return False

    @property
    def rule_refusal(self) -> str:
        """By default a kind has no router whose weights a rule could change."""
        return "this kind of layer has no router whose weights a rule could change"

    @property
    def set_refusal(self) -> str:
        """By default no expert of a kind may be left out."""
        return f"its mixtures are of the kind {type(self).__name__}, which expert sets do not know"
