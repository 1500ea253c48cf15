"""The parameters of self-contrast decoding in a request (SCMoE, arXiv 2405.14507).

Every token is computed twice: with the request's own experts (the strong row), and with only the expert of one lower
rank (the weak row). It is sampled from the difference of their logits. Standard library only. Not here: how rows become
logits (see `engine/sampling/contrast.py`).
"""

from dataclasses import dataclass

from model.errors import InvalidRequest, shown

MAX_BETA = 10.0


@dataclass(frozen=True, slots=True)
class Contrast:
    """With z the logits of the two rows: (1 + beta) · z_strong - beta · z_weak, of the tokens whose probability in the
    strong row is at least `alpha` times that of its best one."""

    beta: float = 0.5  # 0: plain decoding
    alpha: float = 0.1
    weak_rank: int = 2  # in the weak row, each token runs the expert of this rank in its order, 1 being the best

    def check(self, most: int, param: str) -> None:
        """Raise InvalidRequest if a value is out of range; `most` is the lowest rank of an expert."""
        if not 0 <= self.beta <= MAX_BETA:
            raise _out_of_range(f"{param}.beta", f"between 0 and {MAX_BETA:g}", self.beta)
        if not 0 < self.alpha <= 1:
            raise _out_of_range(f"{param}.alpha", "above 0 and at most 1", self.alpha)
        if not 1 <= self.weak_rank <= most:
            raise _out_of_range(f"{param}.weak_rank", f"between 1 and {most} for this model", self.weak_rank)


def _out_of_range(param: str, allowed: str, value: float) -> InvalidRequest:
    return InvalidRequest(f"{param} must be {allowed}, got {shown(value)}", param)
