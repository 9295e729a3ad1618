"""Public contract checks: what every module, ground-floor function, claim and reader of polyspan must fulfil.

The project's own tests walk over all public members with them, so that a new one cannot be forgotten; people who
write a layer or a reader of their own can use them as well.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

from polyspan._testing_reader import check_reader
from polyspan.claims import Claim, judge

__all__ = [
    "LinalgCase",
    "ModuleCase",
    "check_claim",
    "check_control",
    "check_linalg",
    "check_module",
    "check_reader",
    "check_trial",
    "public_estimators",
    "public_members",
    "public_modules",
]

FAMILIES = ("align", "cluster", "checkpoints", "learn", "scenes", "symbols", "sketch")


@dataclass(frozen=True)
class ModuleCase:
    """How to make a torch module and what to feed it.

    Parameters
    ----------
    make : callable
        ``make(**factory) -> nn.Module``, where ``factory`` holds ``device`` and ``dtype``.
    inputs : callable
        ``inputs(batch, generator) -> tuple of float tensors`` whose first dimension is the batch.
    batch_free : bool
        Whether an item's output is independent of the others in the batch; batch norms, for instance, are not.
    compiles : bool
        Whether the module declares that ``torch.export`` can capture it.
    gradient : bool
        Whether ``gradcheck`` can run on the inputs in float64 (no, for samplers and hard selections).
    """

    make: Callable[..., Any]
    inputs: Callable[[int, Any], tuple]
    batch_free: bool = True
    compiles: bool = True
    gradient: bool = True


def public_members(package: str) -> dict[str, Any]:
    """Return the public members of a package by name: whatever its stub lists."""
    module = import_module(package)
    return {name: getattr(module, name) for name in sorted(module.__all__)}


def public_modules() -> dict[str, type]:
    """Return every public torch module of ``polyspan.nn`` and of the families, by dotted name."""
    from torch import nn

    return {
        f"{package}.{name}": member
        for package in ("nn", *FAMILIES)
        for name, member in public_members(f"polyspan.{package}").items()
        if inspect.isclass(member) and issubclass(member, nn.Module)
    }


def public_estimators() -> dict[str, type]:
    """Return every public scikit-learn estimator, by dotted name; base classes that cannot be fitted are left out."""
    from sklearn.base import BaseEstimator

    return {
        f"{package}.{name}": member
        for package in ("nn", *FAMILIES)
        for name, member in public_members(f"polyspan.{package}").items()
        if inspect.isclass(member) and issubclass(member, BaseEstimator) and "_fit_is_abstract" not in vars(member)
    }


def check_module(case: ModuleCase) -> None:
    """Check a torch module: shapes over batch sizes, dtype, device, state_dict, gradients, capture, determinism.

    Whether items of a batch depend on one another is asked in float64: in float32 rounding, which may differ with the
    size of a batch, can be as large as a small dependence. Weights are those of one seed; the global generator is left
    as it was.

    Raises
    ------
    AssertionError
        Saying which promise is broken.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        _check_module(case)


def _check_module(case: ModuleCase) -> None:
    import torch

    def feed(batch, dtype=torch.float32):
        return tuple(x.to(dtype) for x in case.inputs(batch, torch.Generator().manual_seed(batch)))

    module = case.make(device="cpu", dtype=torch.float32).eval()
    outputs = {batch: _first(module(*feed(batch))) for batch in (1, 2, 5)}
    for batch, out in outputs.items():
        assert out.shape[0] == batch, f"a batch of {batch} gave an output whose first dimension is {out.shape[0]}"
        assert out.shape[1:] == outputs[1].shape[1:], "an item's output shape depends on the batch size"
        assert out.dtype == torch.float32, f"float32 in gave {out.dtype} out"
        assert torch.isfinite(out).all(), "finite input gave NaN or infinity"
    again = _first(module(*feed(5)))
    assert torch.equal(outputs[5], again), "the same module gave two outputs for one input in eval mode"
    wide = case.make(device="cpu", dtype=torch.float64).eval()
    whole = feed(5, torch.float64)
    together = _first(wide(*whole))
    assert together.dtype == torch.float64, "float64 in did not give float64 out"
    if case.batch_free:
        alone = torch.cat([_first(wide(*(x[i : i + 1] for x in whole))) for i in range(5)])
        torch.testing.assert_close(alone, together, msg="an item's output depends on the others in its batch")
    _check_state(case, module, feed)
    _check_gradients(case, feed)
    if case.compiles:
        exported = torch.export.export(module, feed(2)).module()
        torch.testing.assert_close(_first(exported(*feed(2))), outputs[2], msg="the exported module computes otherwise")
    meta = case.make(device="meta", dtype=torch.float32)
    assert all(p.is_meta for p in meta.parameters()), "device='meta' still allocated a parameter"


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


def _check_state(case: ModuleCase, module: Any, feed: Callable) -> None:
    """A fresh module that loads the state computes the same, and so does a deep copy."""
    import torch

    fresh = case.make(device="cpu", dtype=torch.float32).eval()
    fresh.load_state_dict(module.state_dict(), strict=True)
    expected = _first(module(*feed(2)))
    assert torch.equal(_first(fresh(*feed(2))), expected), "load_state_dict does not restore the module"
    assert torch.equal(_first(copy.deepcopy(module)(*feed(2))), expected), "a deep copy computes otherwise"


def _check_gradients(case: ModuleCase, feed: Callable) -> None:
    """Every trainable parameter gets a finite gradient; input gradients agree with finite differences."""
    import torch

    module = case.make(device="cpu", dtype=torch.float64).train()
    inputs = tuple(x.requires_grad_() for x in feed(3, torch.float64))
    weights = torch.linspace(0.5, 1.5, _first(module(*inputs)).numel(), dtype=torch.float64)
    (_first(module(*inputs)).reshape(-1) * weights).sum().backward()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"parameter {name} gets no gradient"
            assert torch.isfinite(parameter.grad).all(), f"parameter {name} gets a gradient that is not finite"
    if case.gradient:
        module.eval()
        small = tuple(x.detach()[:2].requires_grad_() for x in inputs)
        assert torch.autograd.gradcheck(lambda *x: _first(module(*x)), small, fast_mode=True)


def _as_it_is(out: Any) -> Any:
    return out


@dataclass(frozen=True)
class LinalgCase:
    """Arguments for a ground-floor function.

    Parameters
    ----------
    args : callable
        ``args(rng) -> tuple``, NumPy float64 arrays (and plain values), unbatched.
    kwargs : mapping
        Keyword arguments; a value ``"rng"`` is replaced by a generator of the arrays' kind.
    batched : bool
        Whether leading dimensions are allowed.
    torch : bool
        Whether torch tensors are allowed.
    result : callable
        Takes from the result what has no free sign or basis, such as a projector; an array or a tuple of arrays.
    tol : float
        Agreement between kinds in float64.
    """

    args: Callable[[np.random.Generator], tuple]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    batched: bool = True
    torch: bool = True
    result: Callable[[Any], Any] = _as_it_is
    tol: float = 1e-9


def check_linalg(function: Callable, case: LinalgCase) -> None:
    """Check a ground-floor function: NumPy and torch agree, batches equal loops, dtype is kept, inputs stay untouched.

    Raises
    ------
    AssertionError
        Saying which promise is broken.
    """
    args = case.args(np.random.default_rng(0))
    before = copy.deepcopy(args)
    state = _global_state()
    expected = _results(case, function(*args, **_with_rng(case, "numpy")))
    assert _global_state() == state, "the global NumPy generator was used"
    for mine, kept in zip(args, before, strict=True):
        assert _same(mine, kept), "an argument was changed in place"
    narrow = _results(case, function(*_cast(args, np.float32), **_with_rng(case, "numpy")))
    for wide, small in zip(expected, narrow, strict=True):
        if hasattr(wide, "dtype") and wide.dtype == np.float64:
            assert small.dtype == np.float32, f"float32 in gave {small.dtype} out"
            np.testing.assert_allclose(small, wide, rtol=2e-3, atol=2e-3, err_msg="float32 is far from float64")
    if case.torch:
        _check_torch(function, case, args, expected)
    if case.batched:
        other = case.args(np.random.default_rng(1))
        stacked = [
            np.stack(pair) if isinstance(pair[0], np.ndarray) else pair[0] for pair in zip(args, other, strict=True)
        ]
        both = _results(case, function(*stacked, **_with_rng(case, "numpy")))
        second = _results(case, function(*other, **_with_rng(case, "numpy")))
        for joint, *single in zip(both, expected, second, strict=True):
            np.testing.assert_allclose(
                joint, np.stack(single), atol=case.tol, rtol=case.tol, err_msg="a batch is no loop"
            )


def _global_state() -> str:
    return str(np.random.get_state())  # noqa: NPY002 - it must stay as it is


def _check_torch(function: Callable, case: LinalgCase, args: tuple, expected: list) -> None:
    import torch

    tensors = tuple(torch.as_tensor(a) if isinstance(a, np.ndarray) else a for a in args)
    default, state = torch.get_default_dtype(), torch.random.get_rng_state()
    found = _results(case, function(*tensors, **_with_rng(case, "torch")))
    assert torch.get_default_dtype() == default, "torch's default dtype was changed"
    assert torch.equal(torch.random.get_rng_state(), state), "the global torch generator was used"
    for mine, reference in zip(found, expected, strict=True):
        if isinstance(reference, np.ndarray):
            assert isinstance(mine, torch.Tensor), f"tensors in gave {type(mine).__name__} out"
            np.testing.assert_allclose(
                mine.numpy(), reference, atol=case.tol, rtol=case.tol, err_msg="torch and NumPy differ"
            )


def _results(case: LinalgCase, out: Any) -> list:
    out = case.result(out)
    return list(out) if isinstance(out, tuple | list) else [out]


def _cast(args: Sequence, dtype: Any) -> tuple:
    return tuple(a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype == np.float64 else a for a in args)


def _with_rng(case: LinalgCase, kind: str) -> dict:
    if "rng" not in case.kwargs:
        return dict(case.kwargs)
    if kind == "numpy":
        return {**case.kwargs, "rng": np.random.default_rng(7)}
    import torch

    return {**case.kwargs, "rng": torch.Generator().manual_seed(7)}


def _same(a: Any, b: Any) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else True


def check_claim(claim: Claim, *, seeds: int | None = None) -> None:
    """Check a claim: the control fails, arms share their data and leave it alone, and a trial repeats.

    Raises
    ------
    AssertionError
        Saying which promise is broken.
    """
    check_control(claim, seeds=seeds)
    check_trial(claim)


def check_control(claim: Claim, *, seeds: int | None = None) -> None:
    """Check that a claim fails in its control world, over ``seeds`` seeds: those of level quick where not given.

    Raises
    ------
    AssertionError
        The verdict is another, or an arm is missing.
    """
    count = claim.seeds["quick"] if seeds is None else seeds
    sign = 1.0 if claim.better == "higher" else -1.0
    gains = []
    for seed in range(count):
        data = claim.worlds[claim.control](seed)
        arms = claim.trial(data, seed)
        assert {"method", "baseline"} <= set(arms), f"{claim.slug}: trial lacks an arm, it has {sorted(arms)}"
        gains.append(sign * (arms["method"] - arms["baseline"]))
    verdict, interval = judge(gains, claim.margin)
    assert verdict == "fails", f"{claim.slug}: the control world {claim.control!r} is {verdict}, gain {interval}"


def check_trial(claim: Claim) -> None:
    """Check that a world gives the same data for a seed, and that a trial leaves them alone and repeats.

    Raises
    ------
    AssertionError
        Saying which promise is broken.
    """
    world = claim.levels["quick"][0]
    first, second = claim.worlds[world](0), claim.worlds[world](0)
    for mine, other in zip(_parts(first), _parts(second), strict=True):
        assert _equal(mine, other), f"{claim.slug}: the world {world!r} gives other data for the same seed"
    result = dict(claim.trial(first, 0))
    for mine, other in zip(_parts(first), _parts(second), strict=True):
        assert _equal(mine, other), f"{claim.slug}: a trial changes the data that the arms share"
    assert dict(claim.trial(second, 0)) == result, f"{claim.slug}: the same trial gave two results"


def _parts(data: Any) -> Iterator[Any]:
    yield from data if isinstance(data, tuple) else (data,)


def _equal(a: Any, b: Any) -> bool:
    if hasattr(a, "indptr"):
        return a.shape == b.shape and (a != b).nnz == 0
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b)
