"""Checks of types cost a quarter of the tests' time where no shape is at stake: they are made cheap here.

The import hook wraps every function of the package so that shapes in its signature are checked at each call, whether
there are any or not. Functions without them keep the plain check of their types, and functions made inside of others,
which would be wrapped anew at every call of the outer one, are left to the static checker.
"""

import gc
import inspect
from functools import partial

import jaxtyping
from beartype import beartype

check_shapes = jaxtyping.jaxtyped


def check_types(thing=None, *, typechecker):
    if thing is None:
        return partial(check_types, typechecker=typechecker)
    if isinstance(thing, classmethod | staticmethod):
        return type(thing)(check_types(thing.__func__, typechecker=typechecker))
    if isinstance(thing, property):
        parts = (part and check_types(part, typechecker=typechecker) for part in (thing.fget, thing.fset, thing.fdel))
        return property(*parts, thing.__doc__)
    if inspect.isfunction(thing) and "jaxtyping" not in repr(thing.__annotations__):
        return thing if "<locals>" in thing.__qualname__ else beartype(thing)
    return check_shapes(thing, typechecker=typechecker)


jaxtyping.jaxtyped = check_types


def pytest_collection_finish():
    """Leave what is there for good out of garbage collections, which took a twentieth of the time."""
    gc.collect()
    gc.freeze()
