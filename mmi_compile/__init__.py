"""MMInference as a ``torch.compile`` backend."""

__version__ = "0.1.0"
