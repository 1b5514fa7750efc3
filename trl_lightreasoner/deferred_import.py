"""Modules that are imported when they are first used, whoever imports them before."""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _DeferredModule(ModuleType):
    """Python asks a module for `__getattr__` only where it lacks a name: one that is not executed lacks nearly all."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__path__", "__version__"):  # of every module, tools ask for them
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]  # as any other from now on
        spec = self.__spec__
        self.__path__ = spec.submodule_search_locations  # type: ignore[union-attr, assignment]
        try:
            spec.loader.exec_module(self)  # type: ignore[union-attr]
        except BaseException:
            del self.__path__
            self.__class__ = _DeferredModule  # to fail at the next use as well
            raise
        return getattr(self, name)


def defer_import(name: str) -> None:
    """
    Have a package imported when somebody uses it, not when somebody imports it. One that is imported already, or is
    not installed, is left alone.

    (`importlib.util.LazyLoader` imports it at the second `import` statement, which asks for `__spec__`.)
    """
    if name in sys.modules or (spec := find_spec(name)) is None:
        return
    module = _DeferredModule(name)
    module.__spec__, module.__loader__, module.__file__ = spec, spec.loader, spec.origin
    module.__package__ = name
    sys.modules[name] = module
