"""What checkpoints weigh: their parameters, by the headers of their files, and the bytes of these files."""

import math
from pathlib import Path
from typing import NamedTuple

from polyspan.io import ShardedState

from ._hub import local_checkpoint
from ._merge_states import ADAPTER

ADAPTER_WEIGHTS = "adapter_model.safetensors"


class CheckpointSize(NamedTuple):
    """Numbers in the tensors of a checkpoint, and bytes of the files that they lie in, headers included."""

    parameters: int
    bytes: int


def checkpoint_size(path: Path | str) -> CheckpointSize:
    """Return the size of a .safetensors file, of a folder of them, of an adapter's folder, or of a name on the hub.

    Only headers are read; files of a folder that its index does not name are not counted.

    Raises
    ------
    FileError
        A file cannot be read, or the folder holds no one checkpoint.
    """
    source = local_checkpoint(path, files=True)
    state = ShardedState(source / ADAPTER_WEIGHTS if (source / ADAPTER).is_file() else source)
    files = {state.file(name) for name in state}
    return CheckpointSize(sum(math.prod(state.shape(name)) for name in state), sum(f.stat().st_size for f in files))
