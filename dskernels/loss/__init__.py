"""The cross entropy of next tokens."""

from dskernels.loss.api import cross_entropy

__all__ = ["cross_entropy"]
