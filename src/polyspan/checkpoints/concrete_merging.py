"""Merge fine-tuned checkpoints through a mask learnt from unlabelled inputs, and AdaMerging, which learns weights."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from polyspan.io import read_members, write_members

from ._adaptation import Adaptation
from ._adaptation_state import RunFile
from .task_vectors import task_arithmetic, ties

METHODS = ("task_arithmetic", "adamerging")
GRANULARITIES = ("task", "layer")
MASKS = ("mean", "sample", "bernoulli")
RIVALS = ("individual", "average", "task_arithmetic", "ties")


class AdaMerged(NamedTuple):
    """What :func:`adamerging` found.

    Attributes
    ----------
    state_dict : dict of str to Tensor
    weights : dict of str to dict of str to float
        One a task and tensor.
    history : list of float
        Mean entropy of the predictions over the tasks at each step, in nats.
    """

    state_dict: dict[str, Tensor]
    weights: dict[str, dict[str, float]]
    history: list[float]


class MergeReport(NamedTuple):
    """Accuracy in [0, 1] by method and task, as :meth:`ConcreteMerger.evaluate` measures it.

    Attributes
    ----------
    accuracy : dict of str to dict of str to float
        "merged" and the rivals asked for, each by task.
    """

    accuracy: dict[str, dict[str, float]]

    def mean(self, method: str = "merged") -> float:
        """Return a method's mean accuracy over the tasks."""
        found = self.accuracy[method]
        return sum(found.values()) / len(found)


class ConcreteMerger:
    r"""Merge T fine-tuned copies of a network by a mask over its weights, shared by the tasks, learnt without labels.

    Each weight has a logit x. A step draws one binary Concrete mask :math:`m = \sigma((\log u - \log(1-u) + x) /
    \lambda)`, u uniform, merges :math:`\theta_0 + \sum_i w_i \tau_i m / \bar m` with the mean of m over one tensor,
    and lowers the entropy of the predictions on a batch of each task by Adam on x. With "task_arithmetic" all w are
    ``scaling``, and only the sum of the task vectors is kept. With "adamerging" each step begins with one Adam step of
    size ``inner_lr`` on w from ``scaling``, through which no gradient flows; then the mask is frozen and w is learnt.

    Low entropy is not accuracy. Linear heads let the network lower it by making features longer, and the merge then
    gets worse; heads given as weights are therefore applied to cosines. A warning tells where heads are linear.
    Memory: 5 vectors of the network's size and the task vectors, 1 or T of them.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    method : {"task_arithmetic", "adamerging"}
    granularity : {"layer", "task"}, default="layer"
        Of AdaMerging's weights: one a task and tensor, or one a task.
    scaling : float, default=0.3
        Weight of each task vector; where AdaMerging starts.
    temperature : float, default=0.5
        λ; lower is nearer to 0 and 1, and its gradients vary more.
    init_logit : float, default=0.0
    lr : float, default=1e-3
        Adam's, on the logits. With a few hundred steps 1e-2 is better than the default, which is made for thousands.
    steps : int, default=2000
    inner_lr : float, default=0.05
    weight_lr : float, default=1e-3
        Adam's, on w after the mask is frozen.
    weight_steps : int, default=1000
    final_mask : {"mean", "sample", "bernoulli"}, default="mean"
        The mask's expectation at temperature 1, σ(x), or one draw: from the Concrete distribution, or of zeros and
        ones. Draws differ from seed to seed.
    clamp : bool, default=True
        Keep w in [0, 1].
    normalize_logits : bool, default=True
        Whether heads given as weights see cosines, times ``logit_scale``.
    logit_scale : float, default=12.0
        The scale with which the heads were trained: 100 for CLIP.
    batch_size : int, default=16
        Rows a task and step, where a loader is a tensor of inputs.
    stop : bool, default=True
        Stop with a warning, and keep the best mask, where entropy rises by a tenth, or where one class takes 95 % of
        a task's predictions and did not at first; looked at every 25 steps.
    joint : bool, default=True
        Take the batches of all tasks through the network in one pass, where they are of one shape and heads are not one
        function: several times as fast for small batches, at the memory of T batches.
    ignore_keys : sequence of str
        Names or patterns whose tensors stay the base's.
    seed : int, default=0
    device : device, optional
        The base's where not given.
    verbose : bool, default=False

    Attributes
    ----------
    mask_ : dict of str to Tensor
        In [0, 1], by name.
    logits_ : dict of str to Tensor
    weights_ : dict of str to dict of str to float
        One a task and tensor.
    history_ : dict of str to list of float
        "mask" and "weights": mean entropy over tasks at each step, in nats.
    skipped_ : list of str
        Tensors that no mask touches: integers, running statistics (averaged), and those ignored.
    labels_ignored_ : list of str
        Tasks whose loader gave labels, which were not used.
    stopped_ : str
        Why the mask stopped early; empty where it did not.
    n_steps_ : int
        Steps of the mask that were taken.
    """

    def __init__(
        self,
        method: str = "task_arithmetic",
        *,
        granularity: str = "layer",
        scaling: float | int = 0.3,
        temperature: float | int = 0.5,
        init_logit: float | int = 0.0,
        lr: float | int = 1e-3,
        steps: int = 2000,
        inner_lr: float | int = 0.05,
        weight_lr: float | int = 1e-3,
        weight_steps: int = 1000,
        final_mask: str = "mean",
        clamp: bool = True,
        normalize_logits: bool = True,
        logit_scale: float | int = 12.0,
        batch_size: int = 16,
        stop: bool = True,
        joint: bool = True,
        ignore_keys: Sequence[str] = (),
        seed: int = 0,
        device: Any = None,
        verbose: bool = False,
    ):
        self.method, self.granularity, self.scaling, self.temperature = method, granularity, scaling, temperature
        self.init_logit, self.lr, self.steps, self.inner_lr = init_logit, lr, steps, inner_lr
        self.weight_lr, self.weight_steps, self.final_mask, self.clamp = weight_lr, weight_steps, final_mask, clamp
        self.normalize_logits, self.logit_scale, self.batch_size = normalize_logits, logit_scale, batch_size
        self.stop, self.joint, self.ignore_keys = stop, joint, ignore_keys
        self.seed, self.device, self.verbose = seed, device, verbose

    def fit(
        self,
        base: nn.Module,
        finetuned: Any,
        loaders: Mapping[str, Any],
        heads: Any = None,
        *,
        checkpoint: Path | str | None = None,
    ) -> "ConcreteMerger":
        """Learn the mask, and with "adamerging" the weights.

        Parameters
        ----------
        base : nn.Module
            Not changed.
        finetuned : mapping of str to checkpoint
            By task: modules, state dicts, .safetensors paths, or folders of LoRA or Tucker adapters.
        loaders : mapping of str to iterable of batches, to Tensor, or to mapping of str to Tensor
            Unlabelled inputs by task. A batch is a tensor, a mapping of the base's arguments, or a tuple that begins
            with one of the two; labels are not looked at. Tensors (n, ...) are shuffled and cut into batches.
        heads : mapping of str to (Tensor or callable), callable, or None
            By task a weight (classes, d) or a function from features to logits; or one function
            ``(call, inputs, task) -> logits`` that runs ``call``, the merged base; None where the base gives logits.
        checkpoint : path, optional
            A .safetensors file that is written every 100 steps and removed at the end. Where it stands already, the
            run goes on from it, and on a CPU ends in the same bits if the loaders give the same batches again.

        Raises
        ------
        ValueError
            An option is outside its range, checkpoints differ in names or shapes, a task lacks inputs or a head,
            entropy is not finite, or ``checkpoint`` is of other work.
        UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
            ``checkpoint`` cannot be used; see :mod:`polyspan.errors`.

        Warns
        -----
        UserWarning
            Heads are linear; the mask stopped early.
        """
        self._check()
        with torch.random.fork_rng(devices=[]):
            run = Adaptation(self, base, finetuned, loaders, heads, summed=self.method == "task_arithmetic")
            self._run = run
            file = RunFile(checkpoint, {} if checkpoint is None else run.work(self._options()))
            logits = run.learn_mask(self, file)
            mask = run.final_mask(logits, self.final_mask, float(self.temperature))
            weights_history = []
            if self.method == "adamerging":
                weights_history = run.learn_weights(self.weight_lr, self.weight_steps, mask, self.clamp, file, logits)
            run.flat.merge(run.weights(), mask)
        self.mask_, self.logits_ = run.flat.named(mask), run.flat.named(logits)
        self.weights_ = run.named_weights()
        self.history_ = {"mask": run.history, "weights": weights_history}
        self.skipped_, self.stopped_, self.n_steps_ = run.flat.skipped, run.stopped, len(run.history)
        self.labels_ignored_ = sorted(run.feed.labelled)
        named = finetuned if isinstance(finetuned, Mapping) else {str(i): f for i, f in enumerate(finetuned)}
        self._given = (base, named, loaders, heads)
        file.remove()
        return self

    def _options(self) -> dict[str, Any]:
        """Options on which the result depends."""
        names = inspect.signature(type(self).__init__).parameters.keys() - {"self", "device", "verbose"}
        return {name: list(v) if isinstance(v := getattr(self, name), tuple) else v for name in sorted(names)}

    def _check(self) -> None:
        for name, options in (("method", METHODS), ("granularity", GRANULARITIES), ("final_mask", MASKS)):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {options}, got {getattr(self, name)!r}")
        for name in ("temperature", "lr", "inner_lr", "weight_lr", "logit_scale"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a number above 0, got {value!r}")
        for name in ("scaling", "init_logit"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be finite, got {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("weight_steps", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def _fitted(self) -> "Adaptation":
        if not hasattr(self, "mask_"):
            raise ValueError("fit must be called first, got a ConcreteMerger without a mask")
        return self._run

    def merged_state_dict(self) -> dict[str, Tensor]:
        """Return the merged checkpoint: new tensors, under all names and in the dtypes of the base."""
        return self._fitted().flat.state_dict()

    def merged_model(self) -> nn.Module:
        """Return a copy of the base that holds the merged weights."""
        self._fitted()
        made = copy.deepcopy(self._given[0])
        made.load_state_dict(self.merged_state_dict())
        return made

    def save_mask(self, path: Path | str) -> Path:
        """Write the logits in float16 to a .safetensors file; :func:`load_mask` makes a mask of them."""
        self._fitted()
        return write_mask(path, self.logits_)

    def evaluate(self, labelled_loaders: Mapping[str, Any], rivals: Sequence[str] = RIVALS) -> MergeReport:
        """Measure the accuracy of the merged network on labelled batches, beside that of its rivals.

        Parameters
        ----------
        labelled_loaders : mapping of str to iterable of batches
            By task; a batch is a tuple of inputs and labels, or a mapping with "labels". Take inputs that the mask
            has not seen: on those it has, its accuracy is a little too good.
        rivals : sequence of str
            Among "individual" (each task's own checkpoint), "average", "task_arithmetic", "ties", "adamerging".

        Raises
        ------
        ValueError
            A rival is unknown, a task has no batch, or a batch no labels.
        """
        run = self._fitted()
        base, finetuned, loaders, heads = self._given
        unknown = [name for name in rivals if name not in (*RIVALS, "adamerging")]
        if unknown:
            raise ValueError(f"rivals must be among {(*RIVALS, 'adamerging')}, got {unknown[0]!r}")
        ignored = self.ignore_keys
        states: dict[str, Callable[[str], Mapping[str, Tensor]]] = {"merged": _always(self.merged_state_dict())}
        for rival in rivals:
            if rival == "individual":
                states[rival] = lambda task: task_arithmetic(
                    base, {task: finetuned[task]}, scaling=1, ignore_keys=ignored
                )
            elif rival == "average":
                states[rival] = _always(
                    task_arithmetic(base, finetuned, scaling=1 / len(run.flat.tasks), ignore_keys=ignored)
                )
            elif rival == "task_arithmetic":
                states[rival] = _always(task_arithmetic(base, finetuned, scaling=self.scaling, ignore_keys=ignored))
            elif rival == "ties":
                states[rival] = _always(ties(base, finetuned, scaling=self.scaling, ignore_keys=ignored))
            else:
                found = adamerging(
                    base, finetuned, loaders, heads, granularity=self.granularity, scaling=self.scaling,
                    lr=self.weight_lr, steps=self.weight_steps, clamp=self.clamp, batch_size=self.batch_size,
                    normalize_logits=self.normalize_logits, logit_scale=self.logit_scale, seed=self.seed,
                    joint=self.joint,
                    device=self.device, ignore_keys=ignored,
                )  # fmt: skip
                states[rival] = _always(found.state_dict)
        return MergeReport(
            {
                name: {task: run.accuracy(state(task), task, labelled_loaders) for task in run.flat.tasks}
                for name, state in states.items()
            }
        )


def _always(state: Mapping[str, Tensor]) -> Callable[[str], Mapping[str, Tensor]]:
    return lambda _: state


def write_mask(path: Path | str, logits: Mapping[str, Tensor]) -> Path:
    """Write logits by name, in float16 and finite."""
    limit = torch.finfo(torch.float16).max
    rows = {name: x.clamp(-limit, limit).to("cpu", torch.float16).numpy() for name, x in logits.items()}
    return write_members(path, rows, metadata={"kind": "concrete mask logits"})


def load_mask(path: Path | str) -> dict[str, Tensor]:
    """Return the mask σ(x), by name, of the logits that :meth:`ConcreteMerger.save_mask` wrote.

    Source: catalogue entry ``concrete-merging``.

    Raises
    ------
    UnreadableFile, CorruptFile, UntrustedFile, WrongContent, TooLarge
        See :mod:`polyspan.errors`.
    """
    return {name: torch.sigmoid(torch.from_numpy(x)) for name, x in read_members(path).items()}


def adamerging(
    base: nn.Module,
    finetuned: Any,
    loaders: Mapping[str, Any],
    heads: Any = None,
    *,
    granularity: str = "layer",
    scaling: float | int = 0.3,
    lr: float | int = 1e-3,
    steps: int = 1000,
    clamp: bool = True,
    normalize_logits: bool = True,
    logit_scale: float | int = 12.0,
    batch_size: int = 16,
    joint: bool = True,
    ignore_keys: Sequence[str] = (),
    seed: int = 0,
    device: Any = None,
    verbose: bool = False,
    checkpoint: Path | str | None = None,
) -> AdaMerged:
    r"""Merge by AdaMerging: learn the weights w of :math:`\theta_0 + \sum_i w_i \tau_i` from unlabelled inputs.

    Adam lowers the entropy of the predictions, summed over one batch a task. Like all that is learnt so it needs heads
    whose entropy cannot fall merely because features grow.
    Source: catalogue entry ``concrete-merging``.

    Parameters
    ----------
    base, finetuned, loaders, heads, checkpoint
        As in :meth:`ConcreteMerger.fit`.
    granularity : {"layer", "task"}, default="layer"
        One weight a task and tensor, or one a task.
    scaling : float, default=0.3
        Where w starts.
    lr, steps, clamp, normalize_logits, logit_scale, batch_size, joint, ignore_keys, seed, device, verbose
        As ``weight_lr``, ``weight_steps`` and the others of :class:`ConcreteMerger`.

    Returns
    -------
    AdaMerged

    Raises
    ------
    ValueError
        As :meth:`ConcreteMerger.fit`.
    """
    options = ConcreteMerger(
        "adamerging", granularity=granularity, scaling=scaling, weight_lr=lr, weight_steps=steps, clamp=clamp,
        normalize_logits=normalize_logits, logit_scale=logit_scale, batch_size=batch_size, joint=joint,
        ignore_keys=ignore_keys, seed=seed, device=device, verbose=verbose,
    )  # fmt: skip
    options._check()
    with torch.random.fork_rng(devices=[]):
        run = Adaptation(options, base, finetuned, loaders, heads, summed=False)
        file = RunFile(checkpoint, {} if checkpoint is None else run.work(options._options()))
        history = run.learn_weights(lr, steps, None, clamp, file)
        run.flat.merge(run.weights())
    file.remove()
    return AdaMerged(run.flat.state_dict(), run.named_weights(), history)
