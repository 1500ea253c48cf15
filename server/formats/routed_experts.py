"""How an answer says which experts its tokens used: the object `routed_experts`."""

from base64 import b64encode
from typing import Any

from engine.types import Routes


def routed_experts_of(routes: Routes | None) -> dict[str, Any]:
    """The field to add to a choice; none where no routes were asked for."""
    if routes is None:
        return {}
    written = {
        "shape": list(routes.shape),
        "dtype": routes.dtype,
        "bits": routes.bits,
        "first": routes.first,
        "data": b64encode(routes.data).decode(),
    }
    return {"routed_experts": written}
