"""Grids of launches: along the first axis alone, since the others end at 65,535 programs."""

import math

MOST = 2**31 - 1  # programs along the first axis of a grid


def grid(*counts: int) -> tuple[int]:
    """Grid of the product of `counts` programs; a kernel takes the last count as fastest.

    Raises:
        ValueError: more programs than a launch can have.
    """
    programs = math.prod(counts)
    if programs > MOST:
        factors = " x ".join(f"{count:,}" for count in counts)
        raise ValueError(
            f"the launch needs {factors} = {programs:,} programs, a GPU takes at most {MOST:,} of "
            "them: split the batch"
        )
    return (programs,)
