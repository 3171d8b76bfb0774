"""Multi-reference 2-D alignment of single-particle electron microscopy images.

Names are loaded when they are first used, so that ``mrefali --help`` pays for none of them.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "mref_ali2d": "run",
    "local_ali2d": "run",
    "ali2d": "run",
    "classify": "run",
    "seed": "run",
    "k_means": "clustering",
    "k_means_groups": "clustering",
    "align": "run",
    "simulate": "simulation",
    "demo": "demonstration",
    "evaluate": "evaluation",
    "null": "control",
    "info": "information",
    "header": "headers",
    "transform2d": "transforms",
    "convert": "conversion",
    "select": "conversion",
    "recenter": "conversion",
    "report": "page",
    "watch": "watching",
    "montage": "sheets",
    "open_run": "results",
    "Run": "results",
    "open_stack": "io",
    "Stack": "io",
    "write_stack": "io",
    "InputError": "errors",
    "RunFailed": "errors",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'mrefali' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mrefali.{_HOMES[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
