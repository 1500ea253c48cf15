"""Has kernels for this machine ready: compiles them into the user's cache where an installation brought none that fits.

A wheel carries kernels for one version of torch and one kind of machine; a checkout has what `make` built. It is called
once, when an engine starts.
"""

import logging

from model.backends.cpu.kernels.build import LOST, BuildError, build, cache_folder, found
from model.backends.cpu.kernels.library import Kernels, candidates, load

log = logging.getLogger(__name__)

BETTER = (
    "this processor runs kernels for %s, which are not here or cannot be loaded; those for %s run: "
    "python -m model.backends.cpu.kernels.build"
)


def provide() -> Kernels:
    """Load the kernels. Where no library can be loaded, compile one first, or say what its absence costs. A library
    for less than the processor can is used, with a warning.

    Raises:
        ValueError: see `load`.
    """
    wanted = candidates()
    if any(found(name) for name in wanted):
        loaded = load()
        if loaded.native:
            if loaded.name != wanted[0]:
                log.warning(BETTER, wanted[0], loaded.name)
            return loaded
        log.warning("%s", loaded.reason)
    if wanted:
        _compile(wanted[0])
    load.cache_clear()  # an earlier question may have been answered before there was a library
    return load()


def _compile(name: str) -> None:
    folder = cache_folder()
    log.info("no native kernels fit this installation; compiling those for %s into %s, once: a minute", name, folder)
    try:
        build(name, folder)
    except BuildError as error:
        log.warning("the native kernels could not be compiled: %s\n%s", error, LOST)
