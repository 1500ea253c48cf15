"""A kind of mixture that only tests know: what adding one takes, in the places where its files would lie.

    shape.py                   model/shapes/running_mean.py
    moe/running_mean.py        model/moe/running_mean.py
    families/running_mean.py   model/families/running_mean.py
    names/running_mean.py      weights/families/running_mean.py

No other file changes. `install` adds these folders to the places that are searched.
"""

from pathlib import Path


def install() -> None:
    """Have the model and the weights find the files here; once is enough."""
    import model.families
    import model.moe
    import weights.families

    here = Path(__file__).parent
    for package, folder in ((model.moe, "moe"), (model.families, "families"), (weights.families, "names")):
        if str(here / folder) not in package.__path__:
            package.__path__.append(str(here / folder))
