"""Training on the host: settings, images, the loop over tasks, runs and their scores.

In the public API `sdlora_edge.train` is a function, too. So this package can be called:
`sdlora_edge.train(settings, out)` is `sdlora_edge.train.loop.train(settings, out)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Whichever module of it is imported first, Python sets the package where the function was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from .loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
