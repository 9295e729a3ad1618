"""``polyspan list`` and ``polyspan show``."""

from ._output import say, show_json, show_table


def list_(*words: str, family: str | None = None, working: bool = False, json: bool = False) -> None:
    """List the systems, or those that match some words.

    Parameters
    ----------
    words : str
        What you are looking for, in your own words; searched by meaning where a sentence encoder is installed
        (the text extra, and POLYSPAN_ENCODER naming the folder of a model), else by words.
    family : str
        Only this family: align, cluster, checkpoints, nn, learn, scenes, symbols or sketch.
    working : bool
        Only systems that work today.
    json : bool
        Print JSON.
    """
    from polyspan import catalog

    found = catalog.search(" ".join(words), encoder=_encoder()) if words else catalog.entries()
    known = sorted({entry.family for entry in catalog.entries()})
    if family is not None and family not in known:
        raise ValueError(f"--family must be one of {', '.join(known)}, got {family!r}")
    found = [e for e in found if (family is None or e.family == family) and (not working or e.status == "working")]
    if json:
        show_json([{"slug": e.slug, "status": e.status, "family": e.family, "summary": e.summary} for e in found])
        return
    if not found:
        say("no system matches; polyspan list shows all")
        return
    show_table(
        "", ("system", "status", "family", "what it does"), [(e.slug, e.status, e.family, e.summary) for e in found]
    )


def _encoder():
    """Return a function from texts to vectors where the user has named a sentence encoder, else None."""
    import os

    path = os.environ.get("POLYSPAN_ENCODER")
    if not path:
        return None
    from polyspan.errors import require

    module = require("sentence_transformers", extra="text", purpose="searching by meaning")
    return module.SentenceTransformer(path).encode


def show(slug: str, *, json: bool = False) -> None:
    """Tell all about one system.

    Parameters
    ----------
    slug : str
        Its name: the slug, the paper's own name or any alias.
    json : bool
        Print JSON.
    """
    from dataclasses import asdict

    from polyspan import catalog

    found = catalog.entry(slug)
    if json:
        show_json(asdict(found) | {"date": str(found.date)})
        return
    who = ", ".join(found.authors) or (f"{found.n_authors} authors" if found.n_authors else "")
    lines = [
        f"{found.slug} ({found.family}, {found.status})",
        f"  {found.title}",
        f"  {who}; {found.date}" + (f"; arXiv:{found.arxiv}" if found.arxiv else ""),
        "",
        f"  {found.summary}",
        "",
        f"  brings   {found.object}",
        f"  python   {found.module}: {', '.join(found.names)}",
        *([f"  command  {command}" for command in found.commands] if found.status == "working" else []),
        *([f"  extras   {', '.join(found.extras)}"] if found.extras else []),
        *([f"  claim    polyspan claim {found.slug}"] if found.status == "working" else []),
    ]
    if found.snippet:
        lines += ["", *("    " + line for line in found.snippet.strip().splitlines())]
    print("\n".join(lines))
