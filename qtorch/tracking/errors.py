"""Errors of the tracking store that callers handle in different ways."""

from __future__ import annotations

from qtorch.core.errors import TrackingError


class NotInStoreError(TrackingError, ValueError):
    """The store has no experiment or run with that name or ID."""


class AlreadyInStoreError(TrackingError, ValueError):
    """The store already has an experiment with that name."""


class RefusedError(TrackingError):
    """The store rejected a request for good: sending it again later cannot succeed."""
