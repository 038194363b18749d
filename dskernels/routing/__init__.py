"""Choosing the experts of each token, and keeping their load even."""

from dskernels.routing.api import balance_loss, route, update_bias

__all__ = ["balance_loss", "route", "update_bias"]
