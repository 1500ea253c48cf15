"""What one token makes a feed-forward layer read and multiply. Plain values; nothing is measured."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenWork:
    """The weights that one token needs of a layer, and its multiplications, each of which comes with an addition.

    A step of several tokens reads the weights that they have in common once.
    """

    shared: float  # weights that every token reads: the router's, and those of experts that always run
    routed: float  # weights of the experts that the token runs
    multiplications: float
