"""One parallel map for all of polyspan: processes here, or a dask or ray cluster; resumable by a journal."""

import traceback
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any, NamedTuple

from polyspan.errors import require

from .device import n_cores, thread_limits
from .journal import Journal
from .progress import progress

ENGINES = ("local", "dask", "ray")
SECONDS_FOR_A_WORKER = 60


class _Task(NamedTuple):
    index: int
    key: str
    item: Any


class _Outcome(NamedTuple):
    """What became of a task: its result, or the error and where in the worker it was raised."""

    task: _Task
    result: Any = None
    error: BaseException | None = None
    where: str = ""


def map_tasks(
    fn: Callable[[Any], Any],
    items: Iterable[Any],
    *,
    workers: int | None = None,
    engine: str = "local",
    address: str | None = None,
    journal: Journal | None = None,
    key: Callable[[Any], str] | None = None,
    label: str = "",
    inner_threads: int | None = None,
) -> list[Any]:
    """Return ``[fn(item) for item in items]``, computed side by side, in order.

    Parameters
    ----------
    fn : callable
        A pure function of one small item (a path, a name, a seed), not of a large array. A cluster imports it there.
    items : iterable
    workers : int, optional
        Processes here; 1 runs in this process; all cores where not given. A cluster has the workers that it has.
    engine : {"local", "dask", "ray"}
        ``"local"`` is joblib's loky; the cluster engines need the extra of that name.
    address : str, optional
        The cluster's address: ``tcp://host:8786`` for dask, ``ray://host:10001`` or ``auto`` for ray. Without one they
        start workers here, ``workers`` of them, and end them afterwards. A task whose worker was lost runs on another;
        where none is left, dask waits for new ones to join.
    journal : Journal, optional
        Results (JSON types) are recorded as they arrive, and items whose key is recorded are not computed again. What
        is returned is then as it reads back from the journal, whether computed now or before.
    key : callable, optional
        Names an item in the journal and in errors; ``str`` where not given.
    label : str
        Heads the progress display; empty shows none.
    inner_threads : int, optional
        At most so many BLAS and torch threads a task; where not given, ``cores // workers`` here, and 1 on a cluster,
        whose slots share a machine. Another number of threads may change the last bits of a result.

    Raises
    ------
    ValueError
        An engine that is not known, fewer than one worker or thread, or two items of one key in a journal.
    MissingExtra
        The engine's package is not installed.
    Exception
        Whatever ``fn`` raised, with a note that names the task's key, or what the engine raised because a worker was
        lost. What was finished stays in the journal, also after Ctrl-C.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}")
    for name, value in (("workers", workers), ("inner_threads", inner_threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    tasks = [_Task(i, (key or str)(item), item) for i, item in enumerate(items)]
    done = _recorded(tasks, journal)
    todo = [task for task in tasks if task.index not in done]
    if todo:
        cores = n_cores()
        workers = min(workers or cores, len(todo))
        threads = inner_threads or (max(1, cores // workers) if engine == "local" else 1)
        run = {"local": _local, "dask": _dask, "ray": _ray}[engine]
        with closing(run(fn, todo, workers, address, threads)) as arriving:
            for outcome in progress(arriving, label=label, total=len(todo)):
                done[outcome.task.index] = _settle(outcome, journal)
    return [done[i] for i in range(len(tasks))]


def _recorded(tasks: list[_Task], journal: Journal | None) -> dict[int, Any]:
    """Return the results that the journal has, by index."""
    if journal is None:
        return {}
    seen: set[str] = set()
    for task in tasks:
        if task.key in seen:
            raise ValueError(f"key must name each item differently when a journal is kept, got {task.key!r} twice")
        seen.add(task.key)
    return {task.index: journal.done[task.key] for task in tasks if task.key in journal.done}


def _settle(outcome: _Outcome, journal: Journal | None) -> Any:
    """Record a result and return it, or raise the task's error with the task's name."""
    if outcome.error is not None:
        outcome.error.add_note(f"in task {outcome.task.key!r}")
        if outcome.where:
            outcome.error.add_note(f"raised in a worker:\n{outcome.where}")
        raise outcome.error
    if journal is None:
        return outcome.result
    journal.record(outcome.task.key, outcome.result)
    return journal.done[outcome.task.key]


def _attempt(fn: Callable[[Any], Any], task: _Task, threads: int) -> _Outcome:
    """Run one task, in whatever process, under its thread limit."""
    try:
        with thread_limits(threads):
            return _Outcome(task, fn(task.item))
    except Exception as error:
        # Raised again, with the task's name, where the map was called.
        return _Outcome(task, error=error, where=traceback.format_exc())


def _loads(fn: Callable) -> bool:
    """Answer from a worker that polyspan and ``fn`` are there."""
    return callable(fn)


def _local(fn, todo: list[_Task], workers: int, address: str | None, threads: int) -> Generator[_Outcome]:  # noqa: ARG001
    """Yield outcomes as they arrive: from this process, or from loky's."""
    if workers == 1:
        for task in todo:
            yield _attempt(fn, task, threads)._replace(where="")
        return
    import joblib

    pool = joblib.Parallel(n_jobs=workers, backend="loky", return_as="generator_unordered", batch_size=1)
    arriving = pool(joblib.delayed(_attempt)(fn, task, threads) for task in todo)
    try:
        for outcome in arriving:  # noqa: UP028 - with yield from, joblib would see the closing first
            yield outcome
    finally:
        with warnings.catch_warnings():
            # An error leaves tasks behind; joblib would warn of each that is not fetched.
            warnings.simplefilter("ignore", UserWarning)
            arriving.close()


def _dask(fn, todo: list[_Task], workers: int, address: str | None, threads: int) -> Generator[_Outcome]:
    """Yield outcomes as they arrive from a dask cluster.

    Not through joblib's dask backend (1.6): it waits for ever for a task that kills its workers, and names no task.
    """
    distributed = require("distributed", extra="dask", purpose="running on a dask cluster")
    here = {} if address else {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.Client(address, set_as_default=False, **here) as client:
        client.wait_for_workers(1, timeout=SECONDS_FOR_A_WORKER)
        # A task that a worker cannot load ends the worker and leaves this process waiting; so this is asked before.
        for worker, answer in client.run(_loads, fn, on_error="return").items():
            if answer is not True:
                raise ValueError(f"fn must load on every worker, got from {worker}: {answer}")
        futures = client.map(_attempt, [fn] * len(todo), todo, [threads] * len(todo), pure=False)
        by_key = {future.key: task for future, task in zip(futures, todo, strict=True)}
        try:
            for future in distributed.as_completed(futures, loop=client.loop):
                error = future.exception()
                yield future.result() if error is None else _Outcome(by_key[future.key], error=error)
        finally:
            client.cancel(futures, force=True)


def _ray(fn, todo: list[_Task], workers: int, address: str | None, threads: int) -> Generator[_Outcome]:
    """Yield outcomes as they arrive from a ray cluster; what is started here is ended here."""
    ray = require("ray", extra="ray", purpose="running on a ray cluster")
    mine = not ray.is_initialized()
    if mine:
        here = {} if address else {"num_cpus": workers, "include_dashboard": False}
        ray.init(address=address, log_to_driver=False, **here)
    try:
        remote = ray.remote(_attempt)
        shared = ray.put(fn)
        pending = {remote.remote(shared, task, threads): task for task in todo}
        while pending:
            ready, _ = ray.wait(list(pending), num_returns=1)
            task = pending.pop(ready[0])
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayError as error:
                yield _Outcome(task, error=error)
    finally:
        if mine:
            ray.shutdown()
