"""What every backend passes to its kernels for dropout; ops/_dropout.py has the definition."""


def threshold(dropout_p: float) -> int:
    """An element is dropped if its 32 random bits, as an unsigned number, lie below this."""
    return min(int(dropout_p * 2**32), 2**32 - 1)
