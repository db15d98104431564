"""The command line: ``meansparse``."""

from .app import app

__all__ = ["app"]
