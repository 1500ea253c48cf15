"""Whether a request can be served at all: by its own numbers, the model's context, the size of the cache and the batch.

It looks at one request, not at others.
"""

from engine.types import MAX_ROUTED_TOKENS, Request
from model.errors import InvalidRequest, context_exceeded


def require_fits(request: Request, context: int, blocks: int, block_size: int, max_running: int) -> None:
    """Refuse a request that could never be served. `context`: in tokens; `blocks`: of the cache; `max_running`: rows of
    a batch.

    Raises:
        InvalidRequest: it is empty, or could never fit.
    """
    length, new = len(request.prompt), request.sampling.max_tokens
    if length < 1:
        raise InvalidRequest("the prompt must have at least one token", "prompt")
    if new < 1 and (new < 0 or request.sampling.prompt_logprobs is None):
        raise InvalidRequest(f"max_tokens must be at least 1, got {new}", "max_tokens")
    if length + new > context:
        raise context_exceeded(length, new, context)
    if request.return_routes and length + new > MAX_ROUTED_TOKENS:
        raise InvalidRequest(
            f"return_routed_experts is for at most {MAX_ROUTED_TOKENS} tokens, but you requested {length + new}"
            f" ({length} in the prompt, {new} as max_tokens)",
            "return_routed_experts",
        )
    rows = request.budget.rows
    if rows > max_running:
        raise InvalidRequest(
            f"experts.contrast takes {rows} rows of a batch, and this server has {max_running} (--max-running)",
            "experts.contrast",
        )
    computed, cache = length + max(new, 1) - 1, blocks // rows * block_size  # the last new token is never computed
    if computed > cache:
        twice = " of a request with experts.contrast, which takes the cache twice" if rows > 1 else ""
        raise InvalidRequest(
            f"The key-value cache of this server computes at most {cache} tokens{twice}. However, you requested "
            f"{length + new} tokens ({length} in the prompt, {new} as max_tokens)",
            "max_tokens",
            "context_length_exceeded",
        )


def require_scores(request: Request, refusal: str) -> None:
    """Refuse a request for log-probabilities of the prompt if the model has none; `refusal`: why, empty if it has.

    Raises:
        InvalidRequest: they are requested, and there are none.
    """
    if request.sampling.prompt_logprobs is not None and refusal:
        raise InvalidRequest(f"this model has no log-probabilities of prompts: {refusal}", "prompt_logprobs")
