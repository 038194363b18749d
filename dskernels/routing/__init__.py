"""Choosing the experts of each token, and keeping their load even."""

from dskernels.routing.api import route, route_hidden
from dskernels.routing.balance import balance_loss, load_statistics, update_bias

__all__ = ["balance_loss", "load_statistics", "route", "route_hidden", "update_bias"]
