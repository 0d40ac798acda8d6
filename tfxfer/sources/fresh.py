"""Networks that others' functions build: with the same names and the same random weights every time."""

import contextlib
import random
from collections.abc import Iterator


@contextlib.contextmanager
def fresh_names_and_seeds(seed: int) -> Iterator[None]:
    """Layers without a name are numbered from the start, whatever was built before: names of blocks stay the same.
    Initializers without a seed draw theirs from Python's generator, which goes on afterwards as if nothing had been."""
    from keras.src.backend.common import global_state
    from keras.src.utils import naming

    names, state = global_state.get_global_attribute("object_name_uids"), random.getstate()
    naming.reset_uids()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
        global_state.set_global_attribute("object_name_uids", names)
