"""The shape of MoE++'s mixtures (arXiv 2410.07348): a pool of feed-forward experts and experts that compute nothing."""

from dataclasses import dataclass

from model.shapes.checks import counts, naturals
from model.shapes.feed_forward import TokenLocal
from model.shapes.mixtures import Router, TopK
from model.shapes.work import TokenWork


@dataclass(frozen=True, slots=True)
class MoEPlusPlus(TopK):
    """A token takes the K of the whole pool that its router scores best: of `experts` feed-forward experts, then
    `constant` ones, which mix their input with a learned vector, `copy` ones, which return it, and `zero` ones.

    What counts as work is the feed-forward experts alone. `residual`: the logits of the mixture before this one, times
    a matrix, are added to the router's.
    """

    constant: int = 2
    copy: int = 1
    zero: int = 1
    residual: bool = False

    def __post_init__(self) -> None:
        naturals(constant=self.constant, copy=self.copy, zero=self.zero)
        TopK.__post_init__(self)
        counts(self.trained, self.maximum)
        if self.router != Router(normalise=True):
            raise ValueError(f"the router of MoE++ is softmax, normalised over what runs, not {self.router}")
        if self.dropping is not None:
            raise ValueError("no choice of MoE++ is dropped")

    @property
    def num_experts(self) -> int:
        """The whole pool."""
        return self.experts + self.constant + self.copy + self.zero

    @property
    def maximum(self) -> int:
        """The whole pool."""
        return self.num_experts

    @property
    def rule_refusal(self) -> str:
        """Rules compare and weigh experts that run, and here some of the chosen ones do not."""
        return "this model chooses among experts that compute nothing, too: experts.free_bias moves that choice"

    set_refusal = TokenLocal.set_refusal

    @property
    def own_fields(self) -> tuple[str, ...]:
        """Experts that compute nothing can be made likelier."""
        return ("free_bias",)

    @property
    def adaptive(self) -> bool:
        """How many of the chosen ones are feed-forward experts depends on the token."""
        return True

    def token_work(self, width: int, count: float) -> TokenWork:
        """As if all the chosen ones were feed-forward experts, which is the most that it may be."""
        most = TopK.token_work(self, width, min(count, self.experts))
        more = (self.num_experts - self.experts + 2 * self.constant) * width
        if self.residual:
            more += self.num_experts**2
        return TokenWork(most.shared + more, most.routed, most.multiplications + more)
