"""When a request may have `return_routed_experts`: what is refused, by name. Not here: how routes are written."""

from engine.types import MAX_ROUTED_TOKENS
from model.errors import InvalidRequest
from model.expert_range import ExpertRange
from server.experts.requested_count import ROUTES_FIELD as FIELD
from server.requests.output_spec import OutputSpec
from server.schemas.base import GenerationBody


def check_allowed(body: GenerationBody, allowed: bool) -> None:
    """Raises InvalidRequest where the operator has not allowed routes, or the body does not go with them.

    The engine sends routes with its last event of a sequence, which a stop string or a call that is found here comes
    before.
    """
    if not body.return_routed_experts:
        return
    if not allowed:
        reason = "is not allowed on this server; its operator allows it with --return-routed-experts"
        raise InvalidRequest(f"{FIELD} = true {reason}", FIELD, "unsupported_parameter")
    if body.stop:
        reason = "has no routes to return where a stop string ends an answer; stop_token_ids can be used"
        raise InvalidRequest(f"stop cannot be combined with {FIELD}, which {reason}", "stop")


def check_routes(body: GenerationBody, spec: OutputSpec, experts: ExpertRange) -> None:
    """Raises InvalidRequest for a model without routes, and where one tool call ends the answer."""
    if not body.return_routed_experts:
        return
    if not experts.layers:
        raise InvalidRequest(f"{FIELD} = true, but this model has no mixture-of-experts layers", FIELD)
    if spec.single:
        reason = "it has no routes to return where the first tool call ends an answer"
        raise InvalidRequest(f"{FIELD} = true cannot be combined with parallel_tool_calls = false: {reason}", FIELD)


def check_size(tokens: int) -> None:
    """Raises InvalidRequest where prompts and answers of a call together may have more tokens than are returned."""
    if tokens > MAX_ROUTED_TOKENS:
        raise InvalidRequest(
            f"{FIELD}: prompt and max_tokens, over all answers, must be at most {MAX_ROUTED_TOKENS} tokens together, "
            f"got {tokens}",
            FIELD,
        )
