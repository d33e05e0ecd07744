"""Several language models write one text together, routed token by token.

    >>> import multicolm
    >>> ensemble = multicolm.load("tiny")
    >>> [answer] = ensemble.generate(["What is Dulerex made from?"], policy="cosd-rule")
    >>> print(answer.text)

Importing this package imports no torch: the names in ``__init__.pyi`` are fetched when they are
first used.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
