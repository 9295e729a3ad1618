"""Checkpoints by their place here or by their name on the hub."""

from pathlib import Path

from polyspan.errors import UnreadableFile, require

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt")


def local_checkpoint(model: Path | str, *, files: bool = False) -> Path:
    """Return the folder of a checkpoint; a name on the hub is fetched first. With ``files``, a weight file will do too.

    Raises
    ------
    UnreadableFile
        There is neither.
    MissingExtra
        huggingface_hub is not installed.
    """
    path = Path(model)
    if path.is_dir() or (files and path.exists()):
        return path
    name = str(model)
    wanted = "a .safetensors file, the folder" if files else "the folder"
    if path.exists() or path.is_absolute() or path.suffix == ".safetensors" or name[:1] == "." or name.count("/") > 1:
        found = "a file" if path.exists() else "nothing"
        raise UnreadableFile(path, found=found, expected=f"{wanted} of a checkpoint, or a model's name on the hub")
    hub = require("huggingface_hub", extra="hf", purpose="fetching a model")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=list(PATTERNS)))
    except (OSError, ValueError) as error:
        told = str(error).strip().split("\n")[0]
        raise UnreadableFile(path, found=told, expected=f"{wanted}, or a model's name on the hub") from error
