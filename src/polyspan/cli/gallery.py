"""``polyspan gallery build`` and ``serve``."""

from pathlib import Path

from ._output import say, show_json


def build(*, out: Path | None = None, evidence: tuple[Path, ...] = (), base_url: str = "", json: bool = False) -> None:
    """Write the static site: a page a system, all verdicts, a feed.

    Parameters
    ----------
    out : Path
        Folder of the site; your own polyspan folder where not given.
    evidence : tuple of Path
        Further folders of evidence, shown beside the project's own and yours.
    base_url : str
        Address at which the site will stand, for the feed's links.
    json : bool
        Print JSON.
    """
    folder = _build(out, evidence, base_url)
    if json:
        show_json({"index": str(folder / "index.html")})
    else:
        print(folder / "index.html")


def serve(
    *, out: Path | None = None, evidence: tuple[Path, ...] = (), host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Build the site and serve it on this machine until Ctrl-C.

    Parameters
    ----------
    out : Path
        Folder of the site; your own polyspan folder where not given.
    evidence : tuple of Path
        Further folders of evidence.
    host : str
        Address to listen on; only this machine can reach the default.
    port : int
        0 takes a free one.
    """
    from polyspan.gallery import serve_gallery

    serve_gallery(_build(out, evidence, ""), host=host, port=port)


def _build(out: Path | None, further: tuple[Path, ...], base_url: str) -> Path:
    from polyspan.gallery import build_gallery, project_evidence
    from polyspan.run import user_folder

    folder = out or user_folder("gallery")
    build_gallery(folder, evidence=[project_evidence(), user_folder("evidence"), *further], base_url=base_url)
    say(f"gallery in {folder}")
    return folder
