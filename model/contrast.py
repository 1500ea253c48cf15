"""What a request says of self-contrast decoding (SCMoE, arXiv 2405.14507).

Every token is computed twice: with the request's own experts (the strong row), and with the one expert of a lower rank
alone (the weak row). It is sampled from what tells the two apart. Standard library only. Not here: how rows become
logits (see `engine/contrast.py`).
"""

from dataclasses import dataclass

MOST_BETA = 10.0


@dataclass(frozen=True, slots=True)
class Contrast:
    """With z the logits of the two rows: (1 + beta) · z_strong - beta · z_weak, of the tokens whose probability in the
    strong row is at least `alpha` times that of its best one."""

    beta: float = 0.5  # 0: plain decoding
    alpha: float = 0.1
    weak_rank: int = 2  # in the weak row, each token runs the expert of this rank in its order, 1 being the best

    @property
    def fault(self) -> tuple[str, str]:
        """The name of a field that no model takes, and why; empty names: there is none."""
        if not 0 <= self.beta <= MOST_BETA:
            return "beta", f"must be between 0 and {MOST_BETA:g}, got {self.beta!r:.64}"
        if not 0 < self.alpha <= 1:
            return "alpha", f"must be above 0 and at most 1, got {self.alpha!r:.64}"
        return "", ""
