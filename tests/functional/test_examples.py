"""The examples in the docstrings of `functional` and `metrics`: every public one has some, and they are right."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import tealightning.functional
import tealightning.metrics

MODULES = [
    f"{package.__name__}.{module.name}"
    for package in (tealightning.functional, tealightning.metrics)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_print_what_they_say(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_and_metric_has_an_example(name):
    module = importlib.import_module(name)
    kind = inspect.isclass if ".metrics." in name else inspect.isroutine
    public = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and kind(inspect.unwrap(value)) and value.__module__ == name
    }
    assert [key for key, value in public.items() if ">>>" not in (value.__doc__ or "")] == []
