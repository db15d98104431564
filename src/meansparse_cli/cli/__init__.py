"""The command line, ``meansparse``: options out of the settings, one function a command. Read ``commands`` first."""

from .app import app

__all__ = ["app"]
