"""What does every row of the step benchmark read? The same random tokens; without JAX, which some rows do not use."""

import numpy as np


def tokens(vocabulary: int, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their targets, the tokens rolled by one, each (batch, length) int32.

    >>> read, targets = tokens(100, 2, 4)
    >>> bool((read[:, 1:] == targets[:, :-1]).all()), read.shape
    (True, (2, 4))
    """
    drawn = np.random.default_rng(0).integers(0, vocabulary, (batch, length), dtype=np.int32)
    return drawn, np.roll(drawn, -1, axis=1)
