"""slimkernels: transformer kernels for PyTorch that are right, fast, and say which one ran."""

from slimkernels.dispatch import BackendError, explain, use_backend
from slimkernels.ops.layer_norm import layer_norm

__version__ = "0.1.0"

__all__ = ["BackendError", "explain", "layer_norm", "use_backend"]
