"""Activations of a model's layer, on disk or in memory, handed out in shuffled batches."""

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.errors import WrongContent
from polyspan.io import EmbeddingReader, PartialRows, digest_array, read_array, read_json, write_array, write_json
from polyspan.io.atomic import settle
from polyspan.io.text import dump_json
from polyspan.run import Journal, Progress, first_interrupt_finishes

from ._tensors import as_array

SUFFIXES = (".npy", ".npz", ".safetensors", ".parquet", ".arrow", ".feather", ".fvecs")
BLOCK_ROWS = 1024
BUFFER_ROWS, BUFFER_BYTES = 65_536, 2**28


class _Block(NamedTuple):
    """Rows ``start`` to ``stop`` of a source."""

    source: int
    start: int
    stop: int


class ActivationStore:
    """Rows of activations (n, d) from files of any size, in an order that is shuffled and can be taken up anywhere.

    Files are cut into blocks. In each pass the blocks come in a new order (those of tables and packed files, which
    can only be read forwards, keep theirs within a file), some are held in a buffer, and the rows of a full buffer
    are shuffled. So memory holds two buffers, and a pass reads every row once. Which row stands where follows from seed
    and pass alone: a training that was killed goes on at any batch.

    Make one by :meth:`from_files`, :meth:`from_model` or :meth:`from_array`.

    Parameters
    ----------
    sources : sequence of EmbeddingReader or ndarray
        Of one width; paths go to :meth:`from_files`.
    buffer_rows : int, optional
        Rows that are shuffled together; left out, 65,536, or as many as take 256 MiB in float32.
    block_rows : int, default=1_024
        Rows that are read together.

    Attributes
    ----------
    n_rows, dim : int

    Raises
    ------
    TypeError
        A source is neither.
    ValueError
        No source, widths that differ, or sizes below 1.
    """

    def __init__(self, sources: Sequence[Any], *, buffer_rows: int | None = None, block_rows: int = BLOCK_ROWS):
        if isinstance(sources, str | Path) or not all(isinstance(s, EmbeddingReader | np.ndarray) for s in sources):
            raise TypeError(
                f"sources must be readers or arrays, got {sources!r:.80}; ActivationStore.from_files opens paths"
            )
        if not sources:
            raise ValueError("sources must be at least one, got none")
        widths = [_shape(source)[1] for source in sources]
        if len(set(widths)) > 1:
            raise ValueError(f"sources must be of one width, got {widths[:10]}")
        if buffer_rows is None:
            buffer_rows = max(block_rows, min(BUFFER_ROWS, BUFFER_BYTES // (4 * widths[0])))
        if block_rows < 1 or buffer_rows < block_rows:
            raise ValueError(
                f"buffer_rows must be at least block_rows, which is at least 1, got {buffer_rows} and {block_rows}"
            )
        self._sources, self.buffer_rows, self.block_rows = list(sources), buffer_rows, block_rows
        self.n_rows, self.dim = sum(_shape(source)[0] for source in sources), widths[0]

    def __len__(self) -> int:
        return self.n_rows

    @classmethod
    def from_array(cls, rows: Any, **options: Any) -> "ActivationStore":
        """Hand out the rows of an array or tensor (n, d); it is not copied, unless it is on a device or of bfloat16."""
        rows = as_array(rows)
        if np.ndim(rows) != 2 or 0 in np.shape(rows):
            raise ValueError(f"rows must be an array (n, d) of at least one row and column, got {np.shape(rows)}")
        return cls([np.asarray(rows)], **options)

    @classmethod
    def from_files(
        cls,
        paths: Path | str | Sequence[Path | str],
        *,
        column: str | None = None,
        member: str | None = None,
        buffer_rows: int | None = None,
        block_rows: int = BLOCK_ROWS,
    ) -> "ActivationStore":
        """Hand out the rows of files, which are mapped or streamed.

        Parameters
        ----------
        paths : path or sequence of path
            ``.npy``, ``.npz``, ``.safetensors``, ``.parquet``, ``.arrow``, ``.feather`` or ``.fvecs`` of rows (n, d);
            float16 and bfloat16 are widened a block at a time.
        column, member : str, optional
            Where the rows stand, in tables and in files of several arrays.

        Raises
        ------
        FileError
            One of its five kinds: a file is cut off, is no array of rows, or (at its batch) has NaN in a row, named.
        """
        several = [paths] if isinstance(paths, Path | str) else list(paths)
        readers = [
            EmbeddingReader(path, column=column, member=member, batch_rows=block_rows) for path in several
        ]  # fmt: skip
        for reader in readers:
            if reader.dim != readers[0].dim:
                raise WrongContent(
                    reader.path, found=f"rows of {reader.dim}", expected=f"{readers[0].dim} as in {readers[0].path}"
                )
        return cls(readers, buffer_rows=buffer_rows, block_rows=block_rows)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Iterable[str],
        layer: str,
        path: Path | str,
        *,
        context: int = 128,
        n_skip: int = 1,
        batch_size: int = 8,
        max_tokens: int | None = None,
        dtype: str = "float16",
        verbose: bool = False,
        **options: Any,
    ) -> "ActivationStore":
        """Run texts through a transformers model, keep what a layer gives at every token, and hand that out.

        Texts are joined by the tokenizer's end of text and cut into windows. The file ``path`` takes the rows in that
        order; beside it ``<stem>.tokens.npy`` takes the token of each row, and ``<stem>.json`` what they are of. A run
        that was killed goes on where it stopped; a file that is complete, and of the same model, texts and layer, is
        used as it is.

        Parameters
        ----------
        model : torch.nn.Module
            In eval mode when it returns; called with ``input_ids`` (b, context).
        tokenizer : callable
            ``tokenizer(text, add_special_tokens=False)["input_ids"]`` is a list of int, as of any fast tokenizer.
        texts : iterable of str
        layer : str
            Name of a submodule, such as "model.layers.8" or "transformer.h.8"; of a tuple its first part is taken.
        path : path
            Ends in .npy.
        context : int
            Tokens a window.
        n_skip : int
            Tokens at the start of each window that are left out: the first gathers attention, and its activations are
            many times as large as all others'.
        batch_size : int
            Windows at a time.
        max_tokens : int, optional
            Rows, at most.
        dtype : {"float16", "float32"}

        Raises
        ------
        ValueError
            The layer is not there, texts fill no window, an activation is NaN (the window is named) or beyond
            float16, or the file is of other work.
        """
        path = Path(path)
        if path.suffix != ".npy":
            raise ValueError(f"path must end in .npy, got {path.name!r}")
        if dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be 'float16' or 'float32', got {dtype!r}")
        if not 0 <= n_skip < context:
            raise ValueError(f"n_skip must be between 0 and below context={context}, got {n_skip}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        windows = _windows(tokenizer, texts, context, n_skip, max_tokens)
        found_layer(model, layer)
        work = {
            "layer": layer,
            "context": context,
            "n_skip": n_skip,
            "dtype": dtype,
            "tokens": digest_array(windows),
            "model": _model_digest(model),
        }
        note = path.with_name(path.stem + ".json")
        if not (path.exists() and note.exists()):
            _record(model, windows, work, path, batch_size, verbose)
            write_array(path.with_name(path.stem + ".tokens.npy"), windows[:, n_skip:].reshape(-1))
            write_json(note, work)
        elif (kept := read_json(note)) != work:
            other = sorted(name for name in work if not isinstance(kept, dict) or kept.get(name) != work[name])
            raise ValueError(f"path must be a new file or one of the same work, got {path.name} with another {other}")
        return cls.from_files(path, **options)

    @staticmethod
    def tokens(path: Path | str) -> np.ndarray:
        """Return the token of each row, (n,) int64, of a file that :meth:`from_model` wrote."""
        path = Path(path)
        return read_array(path.with_name(path.stem + ".tokens.npy"), ndim=1, dtype=np.int64)

    def facts(self) -> dict[str, Any]:
        """Return what tells this store's rows and their order from others', in JSON types."""
        found = []
        for source in self._sources:
            if isinstance(source, EmbeddingReader):
                facts = source.fingerprint()
                del facts["modified_ns"]
                found.append(facts)
            else:
                found.append({"array": digest_array(source)})
        return {"sources": found, "buffer_rows": self.buffer_rows, "block_rows": self.block_rows}

    def n_batches(self, batch_size: int) -> int:
        """Return the batches of a pass; what is left over at its end is dropped, unless it is all there is."""
        return max(1, self.n_rows // batch_size)

    def batches(
        self, batch_size: int, *, seed: int = 0, epoch: int = 0, start: int = 0, shuffle: bool = True
    ) -> Generator[np.ndarray]:
        """Yield the batches of one pass from number ``start`` on, (batch_size, d) in float32 or float64.

        Without ``shuffle`` rows come in the order of the files, and the last batch is what is left.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        last = self.n_batches(batch_size) if shuffle else -(-self.n_rows // batch_size)
        if not 0 <= start <= last:
            raise ValueError(f"start must be between 0 and {last}, got {start}")
        skip, held = start * batch_size, []
        n_held, made = 0, start
        with contextlib.closing(self._pieces(seed, epoch, skip, shuffle)) as pieces:
            for piece in pieces:
                held.append(piece)
                n_held += len(piece)
                if n_held < batch_size:
                    continue
                whole = np.concatenate(held) if len(held) > 1 else held[0]
                for at in range(0, n_held - batch_size + 1, batch_size):
                    if made < last:
                        yield whole[at : at + batch_size]
                        made += 1
                rest = n_held % batch_size
                held, n_held = ([whole[n_held - rest :]] if rest else []), rest
            if made < last and held:
                yield np.concatenate(held) if len(held) > 1 else held[0]

    def sample(self, n: int, *, seed: int = 0) -> np.ndarray:
        """Return up to ``n`` rows: the first of the shuffled order."""
        return next(self.batches(min(n, self.n_rows), seed=seed))

    def _pieces(self, seed: int, epoch: int, skip: int, shuffle: bool) -> Generator[np.ndarray]:
        """Yield rows in order, a buffer at a time, without the first ``skip``."""
        blocks = self._blocks(seed, epoch, shuffle)
        groups: list[list[_Block]] = [[]]
        size = 0
        for block in blocks:
            if size + block.stop - block.start > self.buffer_rows and groups[-1]:
                groups.append([])
                size = 0
            groups[-1].append(block)
            size += block.stop - block.start
        with contextlib.closing(_Reading(self._sources)) as reading:
            for number, group in enumerate(groups):
                n = sum(block.stop - block.start for block in group)
                if skip >= n:
                    skip -= n
                    continue
                rows = np.concatenate([reading.read(block) for block in group])
                if shuffle:
                    rows = rows[np.random.default_rng([seed, epoch, number]).permutation(n)]
                yield rows[skip:]
                skip = 0

    def _blocks(self, seed: int, epoch: int, shuffle: bool) -> list[_Block]:
        cut = []
        for number, source in enumerate(self._sources):
            n = _shape(source)[0]
            cut.append([_Block(number, at, min(at + self.block_rows, n)) for at in range(0, n, self.block_rows)])
        if not shuffle:
            return [block for part in cut for block in part]
        rng = np.random.default_rng([seed, epoch])
        # A source that can only be read forwards is one run; blocks of all others are runs of their own.
        runs = [
            run
            for source, part in zip(self._sources, cut, strict=True)
            for run in ([part] if _forwards(source) else [[block] for block in part])
        ]
        return [block for place in rng.permutation(len(runs)) for block in runs[place]]


class _Reading:
    """Reads blocks; where one follows on the last, the same stream goes on."""

    def __init__(self, sources: Sequence[Any]):
        self._sources = sources
        self._stream: Any = None
        self._next: tuple[int, int] | None = None

    def read(self, block: _Block) -> np.ndarray:
        source = self._sources[block.source]
        if not isinstance(source, EmbeddingReader):
            return source[block.start : block.stop]
        if self._next != (block.source, block.start):
            self.close()
            self._stream = source.batches(block.start) if _forwards(source) else source.read(block.start)
        batch = next(self._stream)
        self._next = (block.source, block.stop)
        return batch.rows

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = self._next = None


def _shape(source: Any) -> tuple[int, int]:
    return (source.n_rows, source.dim) if isinstance(source, EmbeddingReader) else source.shape


def _forwards(source: Any) -> bool:
    """Tell whether a source can only be read from its start on: tables, and packed members of archives."""
    return isinstance(source, EmbeddingReader) and not source.random_access


# Activations of a model.


def found_layer(model: Any, layer: str) -> Any:
    """Return a submodule by its name.

    Raises
    ------
    ValueError
        There is none; names that are near are shown.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        tail = layer.rsplit(".", 1)[-1]
        near = [name for name in names if tail.isdigit() and name.endswith(f".{tail}")] or names
        raise ValueError(f"layer must name a submodule of the model, such as {near[:8]}, got {layer!r}")
    return model.get_submodule(layer)


def _windows(tokenizer: Any, texts: Iterable[str], context: int, n_skip: int, max_tokens: int | None) -> np.ndarray:
    """Return tokens (n, context) int64 of texts that are joined by the end of text."""
    if isinstance(texts, str):
        raise ValueError("texts must be several, got one str: put it in a list")
    if max_tokens is not None and max_tokens < context - n_skip:
        raise ValueError(f"max_tokens must be at least a window's {context - n_skip} rows, got {max_tokens}")
    wanted = None if max_tokens is None else max_tokens // (context - n_skip) * context
    end = getattr(tokenizer, "eos_token_id", None)
    parts, n = [], 0
    for text in texts:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
        if not ids:
            continue
        if end is not None:
            ids.append(end)
        parts.append(np.asarray(ids, np.int64))
        n += len(ids)
        if wanted is not None and n >= wanted:
            break
    if n < context:
        raise ValueError(f"texts must fill a window of {context} tokens, got {n}")
    whole = np.concatenate(parts)
    return whole[: n // context * context].reshape(-1, context)[: None if wanted is None else wanted // context]


def _model_digest(model: Any) -> str:
    """Return a digest of the names and the numbers of a model."""
    import torch

    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(dump_json([name, str(value.dtype), list(value.shape)]).encode())
        raw = value.detach().cpu().contiguous().reshape(-1)
        total.update((raw.view(torch.uint8) if raw.numel() else raw).numpy().data)
    return total.hexdigest()


def _record(model: Any, windows: np.ndarray, work: dict[str, Any], path: Path, batch_size: int, verbose: bool) -> None:
    """Fill the file window by window, going on where a killed run stopped."""
    kept = work["context"] - work["n_skip"]
    partial = path.with_name(f".{path.name}.partial")
    rows: Any = None
    try:
        with (
            first_interrupt_finishes() as asked,
            Progress("activations", len(windows), enabled=verbose) as shown,
        ):
            first = 0
            while rows is None or first < len(windows):
                if rows is not None and asked.requested:
                    raise KeyboardInterrupt
                part = windows[first : first + batch_size]
                made = _run(model, part, work["layer"])[:, work["n_skip"] :]
                made = made.reshape(-1, made.shape[-1])
                if rows is None:
                    rows = PartialRows(
                        partial, n_rows=len(windows) * kept, dim=made.shape[1], dtype=work["dtype"], work=work
                    )
                    if rows.filled:
                        first = rows.filled // kept
                        shown.advance(first)
                        continue
                _check(made, first, kept, work["dtype"])
                rows.append(first * kept, made.astype(work["dtype"]))
                first += len(part)
                shown.advance(len(part))
            rows.sync()
    except BaseException:
        if rows is not None:
            with contextlib.suppress(OSError):
                rows.sync()
        raise
    finally:
        if rows is not None:
            rows.close()
    settle(partial, path, partial.stat().st_mode & 0o777)
    Journal.discard(partial.with_name(partial.name + ".journal"))


def _check(made: np.ndarray, first: int, kept: int, dtype: str) -> None:
    bad = ~np.isfinite(made).all(axis=1)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(f"the layer must give finite numbers, got NaN or infinity in window {first + row // kept}")
    largest = float(np.abs(made).max())
    if dtype == "float16" and largest > float(np.finfo(np.float16).max):
        raise ValueError(f"dtype must be 'float32' for activations of up to {largest:.3g}, got 'float16'")


def _run(model: Any, windows: np.ndarray, layer: str) -> np.ndarray:
    """Return what the layer gives for windows of tokens, (b, context, d) in float32."""
    import torch

    caught: list[Any] = []

    def catch(module: Any, inputs: Any, output: Any) -> None:  # noqa: ARG001 - the form of a hook
        caught.append(output[0] if isinstance(output, tuple | list) else output)

    model.eval()
    handle = found_layer(model, layer).register_forward_hook(catch)
    try:
        at = next(model.parameters()).device
        with torch.no_grad():
            model(input_ids=torch.from_numpy(np.ascontiguousarray(windows)).to(at))
    finally:
        handle.remove()
    if len(caught) != 1 or not isinstance(caught[0], torch.Tensor) or caught[0].ndim != 3:
        raise ValueError(f"layer must run once and give a tensor (b, t, d), got {len(caught)} runs of {layer!r}")
    return caught[0].float().cpu().numpy()
