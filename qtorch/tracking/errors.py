"""Errors of the tracking store that callers tell apart."""

from __future__ import annotations

from qtorch.core.errors import TrackingError


class NotInStoreError(TrackingError, ValueError):
    """The store holds no experiment or recorder of that name or id."""


class AlreadyInStoreError(TrackingError, ValueError):
    """The store holds an experiment of that name already."""


class RefusedError(TrackingError):
    """The store answered, and will refuse the same request again: sending it later is no use."""
