"""A kind of mixture that only tests know: what adding one takes, in the places where its files would lie.

    shape.py                   model/shapes/running_mean.py
    moe/running_mean.py        model/moe/running_mean.py
    families/running_mean.py   model/families/running_mean.py
    names/running_mean.py      weights/families/running_mean.py

No other file changes. `installed` adds these folders to the places that are searched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def installed() -> Iterator[None]:
    """Have the model and the weights find the files here meanwhile."""
    import model.families
    import model.moe
    import weights.families

    here = Path(__file__).parent
    places = [(model.moe.__path__, "moe"), (model.families.__path__, "families"), (weights.families.__path__, "names")]
    for path, folder in places:
        path.append(str(here / folder))
    try:
        yield
    finally:
        for path, folder in places:
            path.remove(str(here / folder))
