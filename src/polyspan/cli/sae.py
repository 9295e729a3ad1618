"""``polyspan sae train``, ``probe``, ``interactions`` and ``steer``: sparse autoencoders of a model's activations."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from ._output import check_target, say, show_json, show_table
from ._places import check_places

TEXTS = (".txt", ".jsonl")

# Options that several commands take, each with its one description.
Autoencoder = Annotated[
    Path, Parameter(help="What `polyspan sae train` wrote, or a folder of cfg.json and sae_weights.safetensors.")
]
Column = Annotated[str | None, Parameter(help="Of a table with several columns of vectors.")]
Member = Annotated[str | None, Parameter(help="Of a file with several arrays.")]
Device = Annotated[str, Parameter(help='"cpu", "cuda:0", or "auto".')]
AsJson = Annotated[bool, Parameter(help="Print JSON.")]


def train(
    source: Path,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    model: str | None = None,
    layer: str | None = None,
    activations: Path | None = None,
    context: int | None = None,
    column: Column = None,
    member: Member = None,
    latents: int | None = None,
    k: int | None = None,
    ranks: tuple[int, int, int] | None = None,
    order: int = 3,
    activation: str = "topk",
    separate: bool = False,
    cross_only: bool = False,
    learning_rate: float = 3e-4,
    batch: int | None = None,
    tokens: int | None = None,
    cosine: bool = False,
    checkpoint: Path | None = None,
    every: int = 500,
    saelens: Path | None = None,
    eval: Path | None = None,
    compare: bool = False,
    device: Device = "cpu",
    seed: int = 0,
    plot: Path | None = None,
    json: AsJson = False,
) -> None:
    """Train a sparse autoencoder whose decoder multiplies features, on activations of any size.

    Parameters
    ----------
    source : Path
        Activations, rows (n, d): .npy, .npz, .safetensors, .parquet, .arrow, .feather or .fvecs, or a folder of such
        files. With --model: text, .txt (a text a line) or .jsonl (its "text").
    out : Path
        The trained autoencoder, one .safetensors file.
    model : str
        A transformers model, by folder or id, whose layer's activations are taken first.
    layer : str
        The layer, such as "model.layers.8".
    activations : Path
        Where they are kept, a .npy file; beside --out where left out. One that is complete is used again.
    context : int
        Tokens the model sees at a time; 128 where left out.
    latents : int
        How many; 8 for each dimension where left out.
    k : int
        How many fire for a token; 32 where left out.
    ranks : int int int
        Ranks of the linear, quadratic and cubic part.
    order : int
        3, 2, or 1 for a linear autoencoder.
    activation : str
        "topk", "batchtopk", "matryoshka" or "jumprelu".
    separate : bool
        Factors of their own for each order.
    cross_only : bool
        Products of distinct latents only.
    learning_rate : float
        Of Adam.
    batch : int
        Tokens a step.
    tokens : int
        Tokens to train on, each counted as often as it is seen; 16 passes where left out.
    cosine : bool
        Let the learning rate fall to 0 along a cosine.
    checkpoint : Path
        A .safetensors file that is written now and then, and gone on from if it is there.
    every : int
        Steps between checkpoints.
    saelens : Path
        Also write a folder with cfg.json and sae_weights.safetensors.
    eval : Path
        Text on which the model's perplexity is measured, as it is and with reconstructions in the layer's place; with
        --model.
    compare : bool
        Train the linear autoencoder of as many latents as well.
    seed : int
        Of the start and the order of tokens.
    plot : Path
        Draw the errors by step (.svg, .png or .pdf).
    """
    from polyspan.learn import PolySAE

    check_target(out, "--out", ".safetensors")
    check_target(checkpoint, "--checkpoint", ".safetensors")
    kept = out.with_name(out.stem + ".activations.npy") if activations is None else activations
    check_places(
        plot, read=(*_files(source), eval), out=out, checkpoint=checkpoint, activations=kept if model else None
    )
    if saelens is not None and saelens.exists():
        raise ValueError(f"--saelens must be a new folder, got {saelens}, which is there")
    if (model is None) != (layer is None):
        raise ValueError("--model and --layer must be given together")
    if activations is not None and model is None:
        raise ValueError("--activations is for --model: pass a file of activations as the source itself")
    if eval is not None and model is None:
        raise ValueError(f"--eval must go with --model, got {eval} without one")
    if context is not None and model is None:
        raise ValueError(f"--context must go with --model, got {context} without one")
    if model is not None and (column is not None or member is not None):
        raise ValueError("--column and --member must go with files of activations, got --model")
    if compare and order == 1:
        raise ValueError("--compare must go with --order 2 or 3, got 1, which is the linear autoencoder itself")
    length = 128 if context is None else context
    held_out: Any = None
    if model is not None and layer is not None:
        store = _recorded(source, model, layer, kept, length, device)
        held_out = None if eval is None else _held_out(model, eval)
    else:
        store = _store(source, column, member)
    options: dict[str, Any] = {
        "n_components": latents,
        "k": k,
        "activation": activation,
        "learning_rate": learning_rate,
        "schedule": "cosine" if cosine else "constant",
        "batch_size": batch,
        "max_tokens": tokens,
        "device": device,
        "random_state": seed,
        "verbose": True,
    }
    own = {"ranks": ranks, "order": order, "shared": not separate}
    own |= {"cross_only": cross_only}
    arms = {"polynomial" if order > 1 else "linear": own}
    if compare:
        arms["linear"] = {"order": 1}
    curves, found, fitted = {}, {}, {}
    for name, mine in arms.items():
        say(f"training the {name} autoencoder on {store.n_rows:,} rows of {store.dim}")
        sae = PolySAE(**options, **mine)
        sae.fit(store, checkpoint=checkpoint if mine is own else None, checkpoint_every=every)
        curves[name] = sae.loss_curve_
        found[name] = {
            **sae.report(store)._asdict(),
            "dead_share": sae.dead_share_,
            "parameters": sum(p.numel() for p in sae.module_.parameters()),
            "bytes": sum(p.numel() * p.element_size() for p in sae.module_.parameters()),
        }
        fitted[name] = sae
        if mine is own:
            sae.save(out)
            facts = {"latents": sae.module_.num_latents, "k": sae.module_.k, "ranks": list(sae.module_.ranks)}
            facts |= {"steps": sae.n_iter_, "scale": sae.scale_, "file_bytes": out.stat().st_size}
            if saelens is not None:
                sae.export(saelens, metadata={"model_name": model, "hook_name": layer} if model else {})
    if plot is not None:
        from polyspan.learn.polynomial_sae_plots import plot_training

        plot_training(curves, plot)
    told = {}
    if held_out is not None and model is not None and layer is not None:
        told = _perplexities(model, layer, held_out, fitted, length, device)
    if json:
        show_json({"out": str(out), **facts, "report": found, "perplexity": told})
        return
    rows = [("out", str(out)), *((name.replace("_", " "), str(value)) for name, value in facts.items())]
    for name, values in found.items():
        rows += [
            (f"{name}: {key.replace('_', ' ')}", f"{value:,}" if isinstance(value, int) else f"{value:.4g}")
            for key, value in values.items()
        ]
    rows += [(f"perplexity, {name}", f"{value:.4g}") for name, value in told.items()]
    show_table("", ("what", "value"), rows)


def probe(
    sae: Autoencoder,
    source: Path,
    *,
    labels: Path,
    k: int = 1,
    against: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    column: Column = None,
    member: Member = None,
    top: int = 5,
    device: Device = "cpu",
    seed: int = 0,
    plot: Path | None = None,
    json: AsJson = False,
) -> None:
    """Say how well single latents tell labels of tokens, beside the activations themselves.

    Parameters
    ----------
    source : Path
        Activations, a file or a folder of files.
    labels : Path
        A whole number for each row (.npy, or .csv of one column).
    k : int
        Latents that a probe reads.
    against : list of Path
        Other autoencoders, to compare with.
    top : int
        How many latents to name for each label, those whose codes lie the furthest apart.
    seed : int
        Of the rows held out.
    plot : Path
        Draw F1 and accuracy, by what is probed (.svg, .png or .pdf).
    """
    import numpy as np
    from scipy.sparse import vstack

    from polyspan.io import read_array
    from polyspan.learn.polynomial_sae_probing import latent_separation, sparse_probe

    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    check_places(plot, read=(sae, labels, *(against or ()), *_files(source)))
    store = _store(source, column, member)
    wanted = read_array(labels, ndim=None, dtype=np.int64).reshape(-1)
    if len(wanted) != store.n_rows:
        raise ValueError(f"--labels must be one a row, {store.n_rows:,}, got {len(wanted):,}")
    rows = np.concatenate(list(store.batches(min(65536, store.n_rows), shuffle=False)))
    scores = {"activations": sparse_probe(rows, wanted, k=k, random_state=seed)}
    first = None
    for path in (sae, *(against or ())):
        codes = vstack(list(_load(path, device).iter_codes(store)), format="csr")
        scores[str(path)] = sparse_probe(codes, wanted, k=k, random_state=seed)
        first = codes if first is None else first
    apart, classes = latent_separation(first, wanted)
    best = np.argsort(-apart, axis=1, kind="stable")[:, :top]
    named = {
        int(label): [{"latent": int(j), "distance": float(apart[i, j])} for j in best[i]]
        for i, label in enumerate(classes)
    }
    if plot is not None:
        from polyspan.learn.polynomial_sae_plots import plot_probes

        short = {name: Path(name).stem for name in scores}
        short = short if len(set(short.values())) == len(short) else dict.fromkeys(scores)
        plot_probes({short[name] or name: (p.f1, p.accuracy) for name, p in scores.items()}, plot)
    if json:
        shown = {name: {"f1": p.f1, "accuracy": p.accuracy} for name, p in scores.items()}
        show_json({"k": k, "probes": shown, "latents": named})
        return
    show_table(
        f"Probes on {k} column{'s'[: k > 1]}",
        ("on", "F1", "accuracy"),
        [(name, f"{p.f1:.4f}", f"{p.accuracy:.4f}") for name, p in scores.items()],
    )
    lines = [
        (str(label), ", ".join(f"{entry['latent']} ({entry['distance']:.3g})" for entry in entries))
        for label, entries in named.items()
    ]
    show_table("Latents whose codes lie the furthest apart", ("label", "latents"), lines)


def interactions(
    sae: Autoencoder,
    source: Path,
    *,
    top: int = 20,
    degree: int = 2,
    by: str = "data",
    column: Column = None,
    member: Member = None,
    device: Device = "cpu",
    plot: Path | None = None,
    json: AsJson = False,
) -> None:
    """Rank pairs or triples of latents by how much their product adds to what they say alone.

    Parameters
    ----------
    source : Path
        Activations, a file or a folder of files: only latents that fire together in them are ranked.
    top : int
        How many.
    degree : int
        2 for pairs, 3 for triples.
    by : str
        "data": length times the mean product of codes; "norm": length alone.
    plot : Path
        Draw them (.svg, .png or .pdf).
    """
    check_places(plot, read=(sae, *_files(source)))
    found = _load(sae, device).interactions(_store(source, column, member), top=top, degree=degree, by=by)
    if plot is not None:
        from polyspan.learn.polynomial_sae_plots import plot_interactions

        plot_interactions(found, plot)
    rows = list(zip(found.latents.tolist(), *(part.tolist() for part in found[1:4]), strict=True))
    if json:
        entries = [{"latents": e[0], "strength": e[1], "norm": e[2], "share": e[3]} for e in rows]
        show_json({"interactions": entries, "n_sets": found.n_sets, "correlation": found.correlation})
        return
    say(f"{found.n_sets:,} sets fire together; lengths and shares correlate by {found.correlation:.2f}")
    show_table(
        "",
        ("latents", "strength", "length", "share of rows"),
        [(" x ".join(map(str, names)), *(f"{v:.4g}" for v in values)) for names, *values in rows],
    )


def steer(
    sae: Autoencoder,
    *,
    model: str,
    layer: str,
    prompt: str,
    latents: Annotated[list[int], Parameter(consume_multiple=True)],
    strength: float = 8.0,
    sum_only: bool = False,
    tokens: int = 40,
    device: Device = "cpu",
    json: AsJson = False,
) -> None:
    """Let a language model go on with a text while one to three latents are pushed up.

    Parameters
    ----------
    model : str
        A transformers model, by folder or id.
    layer : str
        The layer whose activations it was trained on.
    prompt : str
        The beginning of the text.
    latents : list of int
        One to three.
    strength : float
        How far to push, in units of the latents' codes.
    sum_only : bool
        Leave out what the products of the latents add.
    tokens : int
        How many to write.
    """
    from polyspan.learn.polynomial_sae_steering import steer as pushed
    from polyspan.run import pick_device

    at = pick_device(device)
    if tokens < 1:
        raise ValueError(f"--tokens must be at least 1, got {tokens}")
    direction = _load(sae).direction(latents, interaction=not sum_only)
    network, tokenizer = _language_model(model)
    network = network.to(at)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(at)
    if not ids.shape[1]:
        raise ValueError("--prompt must hold at least one token, got none")

    def written() -> str:
        with_end = {"pad_token_id": tokenizer.eos_token_id} if tokenizer.pad_token_id is None else {}
        made = network.generate(ids, max_new_tokens=tokens, do_sample=False, **with_end)
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    plain = written()
    with pushed(network, layer, direction, strength=strength):
        steered = written()
    if json:
        show_json({"prompt": prompt, "latents": latents, "strength": strength, "plain": plain, "steered": steered})
        return
    show_table("", ("", "text"), [("plain", plain), ("steered", steered)])


def _load(path: Path, device: str = "cpu") -> Any:
    from polyspan.learn import PolySAE
    from polyspan.run import pick_device

    at = pick_device(device)
    found = PolySAE.from_saelens(path) if path.is_dir() else PolySAE.load(path)
    found.module_.to(at)
    return found


def _files(source: Path) -> tuple[Path, ...]:
    """Return the file of activations, or the files of them in a folder."""
    from polyspan.io import list_folder
    from polyspan.learn.activation_store import SUFFIXES

    if not source.is_dir():
        return (source,)
    # Tokens of rows stand beside activations of a model.
    return tuple(p for p in list_folder(source) if p.suffix in SUFFIXES and not p.name.endswith(".tokens.npy"))


def _store(source: Path, column: str | None, member: str | None) -> Any:
    """Return a store of a file, or of the files in a folder."""
    from polyspan.learn import ActivationStore
    from polyspan.learn.activation_store import SUFFIXES

    paths = _files(source)
    if not paths:
        raise ValueError(f"source must hold files of activations ({', '.join(SUFFIXES)}), got none in {source}")
    return ActivationStore.from_files(paths, column=column, member=member)


def _recorded(source: Path, model: str, layer: str, kept: Path, context: int, device: str) -> Any:
    """Return a store of a model's activations on texts, recording what is not there yet."""
    from polyspan.io import read_jsonl, read_text
    from polyspan.learn import ActivationStore
    from polyspan.run import pick_device

    if source.suffix not in TEXTS:
        raise ValueError(f"source must end in {' or '.join(TEXTS)} with --model, got {source.name!r}")
    if source.suffix == ".txt":
        texts = [line for line in read_text(source).split("\n") if line.strip()]
    else:
        texts = []
        for i, entry in enumerate(read_jsonl(source), start=1):
            if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
                raise ValueError(f'source must hold {{"text": ...}} in every line, got another thing in entry {i}')
            texts.append(entry["text"])
    network, tokenizer = _language_model(model)
    say(f"taking activations of {layer}")
    return ActivationStore.from_model(
        network.to(pick_device(device)), tokenizer, texts, layer, kept, context=context, verbose=True
    )


def _held_out(model: str, text: Path) -> Any:
    """Return the tokens (n,) of a text on which perplexity is measured."""
    from polyspan.checkpoints._text_models import token_ids
    from polyspan.errors import WrongContent

    ids = token_ids(model, text)
    if len(ids) < 2:
        raise WrongContent(text, found="one token", expected="two at least, of which one is predicted")
    return ids


def _perplexities(
    model: str, layer: str, ids: Any, fitted: dict[str, Any], context: int, device: str
) -> dict[str, float]:
    """Return the model's perplexity as it is, and with each autoencoder's reconstructions in the layer's place."""
    from polyspan.checkpoints._text_models import perplexity
    from polyspan.learn.polynomial_sae_steering import spliced
    from polyspan.run import pick_device

    say(f"measuring perplexity on {len(ids):,} tokens")
    network = _language_model(model)[0].to(pick_device(device))
    told = {"model": perplexity(network, ids, context=context)}
    for name, sae in fitted.items():
        with spliced(network, layer, sae):
            told[name] = perplexity(network, ids, context=context)
    return told


def _language_model(name: str) -> tuple[Any, Any]:
    from polyspan.errors import require

    transformers = require("transformers", extra="hf", purpose="reading a language model")
    try:
        # In the dtype of its files: in float32 many models would take twice the memory. No file of another kind is
        # read: those may run code.
        network = transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto", use_safetensors=True)
        return network.eval(), transformers.AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"--model must be a folder or an id of a transformers model, got {name!r}: {error}") from None
