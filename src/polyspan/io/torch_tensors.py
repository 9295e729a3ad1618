"""Tensors of torch in .safetensors files: checkpoints of one file or many, mapped; and files written one by one."""

import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from polyspan.errors import UnreadableFile, WrongContent

from ._slabs import Slab, no_member, stored_digests, tensor_slabs
from .arrays import check_digest, write_tensor_blocks
from .text import dump_json, list_folder, read_json

INDEX = "model.safetensors.index.json"
TENSOR_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip
"""What .safetensors calls the dtypes of torch that it knows."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TENSOR_CODES}


class ShardedState(Mapping[str, Tensor]):
    """The tensors of one .safetensors file or of a folder of them, mapped when it is asked for, in its own dtype.

    What is returned must not be written to: it is the file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._slabs: dict[str, Slab] = {}
        self._digests: dict[str, str] = {}
        for file, wanted in _files(self.path):
            found = tensor_slabs(file, refuse_types=False)
            for name in found.slabs if wanted is None else wanted:
                if name not in found.slabs:
                    raise no_member(file, name, list(found.slabs), "tensor")
                if name in self._slabs:
                    raise WrongContent(file, found=f"tensor {name} a second time", expected="distinct names")
                self._slabs[name] = found.slabs[name]
            self._digests.update(stored_digests(file, found.metadata))

    def __iter__(self) -> Iterator[str]:
        return iter(self._slabs)

    def __len__(self) -> int:
        return len(self._slabs)

    def file(self, name: str) -> Path:
        """Return the file that a tensor lies in."""
        return Path(self._slabs[name].path)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._slabs[name].shape

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slabs[name].stored
        if stored not in DTYPES:
            raise WrongContent(
                self._slabs[name].path, found="a dtype that torch cannot add", expected="floats or integers", where=name
            )
        return DTYPES[stored]

    def __getitem__(self, name: str) -> Tensor:
        return self._mapped(name, self._slabs[name])

    def rows(self, name: str, lo: int, hi: int) -> Tensor:
        """Return rows ``lo`` to ``hi`` of a tensor: only they are mapped, and they only while the result is in use."""
        slab = self._slabs[name]
        step = slab.dtype.itemsize * math.prod(slab.shape[1:])
        return self._mapped(name, slab._replace(shape=(hi - lo, *slab.shape[1:]), offset=slab.offset + lo * step))

    def _mapped(self, name: str, slab: Slab) -> Tensor:
        dtype = self.dtype(name)
        # A tensor may be read several times over; its digest is compared once.
        check_digest(self._slabs[name], self._digests.pop(name, None))
        mapped = slab.map().view("i2" if slab.brain else slab.dtype)
        with warnings.catch_warnings():
            # Torch warns that writing to a read-only map would be a fault; no merge writes to what it reads.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            raw = torch.from_numpy(mapped)
        tensor = raw.view(torch.bfloat16) if slab.brain else raw
        # Extremes carry NaN along and, unlike isfinite, need no memory.
        if dtype.is_floating_point and tensor.numel() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
            raise WrongContent(slab.path, found="NaN or infinity", expected="finite numbers", where=f"tensor {name}")
        return tensor


def _files(path: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """Yield each file of a checkpoint with the tensors that belong to it; None stands for all."""
    if not path.is_dir():
        yield path, None
        return
    if (path / INDEX).is_file():
        found = read_json(path / INDEX)
        placed = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(placed, dict) or not all(isinstance(v, str) for v in placed.values()):
            raise WrongContent(path / INDEX, found="no weight_map", expected="a file name for each tensor")
        if any(Path(name).name != name for name in placed.values()):
            raise WrongContent(path / INDEX, found="a file outside the folder", expected="names of files in it")
        for file in sorted(set(placed.values())):
            yield path / file, [name for name, where in placed.items() if where == file]
        return
    files = list_folder(path, "*.safetensors")
    if len(files) != 1:
        raise UnreadableFile(path, found=f"{len(files)} .safetensors files", expected=f"one, or {INDEX} beside several")
    yield files[0], None


def tensor_bytes(block: Tensor) -> memoryview:
    """Return what a tensor of any dtype is in a file; on the CPU and in C order it is not copied."""
    return block.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class TensorEntry(NamedTuple):
    """A tensor that is to be written: what it is, and how it is made when its turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        size = self.dtype.itemsize
        for side in self.shape:
            size *= side
        return size


def write_tensor_file(path: Path, tensors: Mapping[str, TensorEntry | Tensor], *, digests: bool = True) -> Path:
    """Write tensors of any dtype to one .safetensors file, atomically, without a copy of all of them.

    Parameters
    ----------
    path : path
    tensors : mapping of str to Tensor or TensorEntry
        An entry is made when its turn comes; twice with ``digests``, and both times the same.
    digests : bool
        Put the SHA-256 of each tensor into the file, which our readers compare.
    """
    entries = {
        name: given
        if isinstance(given, TensorEntry)
        else TensorEntry(given.dtype, tuple(given.shape), lambda given=given: given)
        for name, given in tensors.items()
    }
    # Wide items first: each tensor then begins at a multiple of its width, as maps need it.
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    facts = {name: (TENSOR_CODES[entries[name].dtype], entries[name].shape) for name in order}
    about = {"format": "pt"}
    if digests:
        found = {name: hashlib.sha256(tensor_bytes(entries[name].make())).hexdigest() for name in order}
        about["polyspan"] = dump_json({"sha256": found}, indent=None)
    return write_tensor_blocks(path, facts, (tensor_bytes(entries[name].make()) for name in order), about)
