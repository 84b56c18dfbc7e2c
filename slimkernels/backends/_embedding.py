"""The dtype of a sum of looked-up rows, of which op and kernels must not have two opinions."""

import torch


def widest(*tables: torch.Tensor | None) -> torch.dtype:
    """The sum's dtype, and that of its gradient, of tables in the first one's dtype or float32."""
    dtypes = [table.dtype for table in tables if table is not None]
    return torch.float32 if torch.float32 in dtypes else dtypes[0]
