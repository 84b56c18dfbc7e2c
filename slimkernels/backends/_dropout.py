"""What dropout's definition, ops/_dropout.py, and every backend's kernels compare bits with."""


def threshold(dropout_p: float) -> int:
    """An element is dropped if its 32 random bits, as an unsigned number, lie below this."""
    return min(int(dropout_p * 2**32), 2**32 - 1)
