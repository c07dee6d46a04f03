"""Classes that the trainer's model shares with an engine in its process, which may change them for itself only."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def classes_kept(policy: nn.Module) -> Iterator[Callable[[nn.Module], None]]:
    """Context in which an engine is loaded, and after which the classes of `policy` are what they were.

    vLLM runs transformers' code itself where it has no class for a model, and decorates that class for its compiler:
    modules of the trainer, which exist already, lack what the decorated class relies on. Called after the context, the
    function gives the modules of the engine's model what was taken back, in subclasses.
    """
    shared = [cls for cls in dict.fromkeys(_classes(policy.modules())) if cls.__flags__ & _HEAP_TYPE]
    before = {cls: (cls.__bases__, dict(vars(cls))) for cls in shared}
    changed: dict[type, type] = {}

    def own_classes(model: nn.Module) -> None:
        for module in model.modules():
            if type(module) in changed:
                module.__class__ = changed[type(module)]

    try:
        yield own_classes
    finally:
        for cls, (bases, attributes) in before.items():
            new = {name: value for name, value in vars(cls).items() if attributes.get(name, _NOTHING) is not value}
            added = tuple(base for base in cls.__bases__ if base not in bases)
            if added:
                cls.__bases__ = bases
            for name in new:
                setattr(cls, name, attributes[name]) if name in attributes else delattr(cls, name)
            if new or added:
                changed[cls] = type(cls.__name__, (cls, *added), {**new, "__module__": cls.__module__})


_HEAP_TYPE = 1 << 9  # of Python: a class that was made by Python code, the only kind that can change
_NOTHING = object()


def _classes(modules: Iterable[nn.Module]) -> Iterator[type]:
    return (cls for module in modules for cls in type(module).__mro__)
