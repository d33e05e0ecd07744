"""Which multicolm this is; for the packages below, which never import the public face of it."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
