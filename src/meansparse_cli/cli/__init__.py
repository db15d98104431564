"""The command line, ``meansparse``: options out of the settings, one function a command. Read ``commands`` first."""

from .interrupt import ctrl_c_quits

with ctrl_c_quits():
    from .app import app

__all__ = ["app"]
