"""Save the state of a pass after every block, from which an interrupted run resumes.

states/blocks/<finished>-<process>.safetensors
    <walk>/<sample>          inputs of the next block, as computed, of this process's samples
    held/<writer>/<tensor>   tensors that no shard contains yet; in the file of process 0
states/blocks/<finished>.json   results so far, digests of shards and of the files above

``finished`` is the number of finished blocks. A pass may resume on another number of processes.
The JSON file is written last and gets its name when it is complete. It replaces the state before
it, so that a state is never half written. A state whose digests do not match its files is not
used.

The folder ``states`` is deleted when the artifact is sealed.

Example: a run is killed in block 7. The next run reads ``states/blocks/7.json``, restores the
writers, and starts its walk at block 7 with the saved inputs.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypedDict, TypeVar, cast

from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor

from sqft_export.errors import UserError
from sqft_export.machine.processes import ALONE, Processes
from sqft_export.model.blocks import Position
from sqft_export.model.tensorfiles import TensorWriter, WriterState, file_sha256, write_tensors
from sqft_export.textfiles import read_json
from sqft_export.untrusted import MAX_JSON_BYTES

STATES = "states"  # folder in an unfinished artifact
BLOCKS = "blocks"
_HELD = "held"

Results = TypeVar("Results")


class _Document(TypedDict):
    """The JSON file of a state.

    results: fields of the pass's results. writers: name -> state.
    files: safetensors file -> its SHA-256.
    """

    results: dict[str, object]
    writers: dict[str, WriterState]
    files: dict[str, str]


class BlockStates(Generic[Results]):
    """The saved states of a pass, its writers, and its results so far.

    results: a dataclass with only JSON values; restored from the last state. It is saved after
        every block.
    writers: name -> writer.
    finished: number of blocks that the last state contains.

    :param folder: folder of the pass. Without a valid state, its files are deleted.
    :param writers: name -> writer; a state contains the tensors that a writer still holds.
    :param kind: dataclass of the results.
    :param walks: names of the walks, in the order in which they finish a block.
    :param processes: processes of the pass; the first one decides which state is valid.
    :param name: folder of the states. keep: folders of states that are not deleted.
    """

    def __init__(
        self,
        folder: Path,
        writers: Mapping[str, TensorWriter],
        kind: type[Results],
        walks: tuple[str, ...] = ("inputs",),
        processes: Processes = ALONE,
        name: str = BLOCKS,
        keep: Collection[str] = (),
    ):
        self.folder, self.writers, self._walks = folder / STATES / name, writers, walks
        self.processes, self.finished, self.results = processes, 0, kind()
        self._inputs: dict[str, list[Tensor]] = {}
        found = processes.from_first(lambda: self._last_valid(folder, keep))
        if found is not None:
            self.finished, document = found
            self.results = TypeAdapter(kind).validate_python(document["results"])
            self._restore(document)

    def _last_valid(self, folder: Path, keep: Collection[str]) -> tuple[int, _Document] | None:
        """Return the last valid state; without one, delete the files of the interrupted pass."""
        found = next(filter(None, map(self._read, self._numbers())), None)
        if found is None:
            delete_files(folder, keep)
        return found

    def position(self, walk: str = "inputs") -> Position:
        """Return where a walk starts; it saves the state after each block."""

        def finish(finished: int, inputs: list[Tensor]) -> None:
            self._inputs[walk] = inputs
            if walk == self._walks[-1]:
                self._save(finished)

        return Position(self.finished, self._inputs.pop(walk, []), finish)

    def _numbers(self) -> list[int]:
        """Return the numbers of the states, the last one first."""
        names = (file.stem for file in self.folder.glob("*.json"))
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def _json(self, finished: int) -> Path:
        return self.folder / f"{finished}.json"

    def _save(self, finished: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        inputs, self._inputs = self._inputs, {}
        file = self.folder / f"{finished}-{self.processes.number}.safetensors"
        digest = write_tensors(file, dict(self._tensors(inputs)))
        files = dict(self.processes.gather((file.name, digest)))
        self.finished = finished
        if not self.processes.is_first:
            return
        document = _Document(
            results=dataclasses.asdict(self.results),  # type: ignore[call-overload]
            writers={name: writer.state() for name, writer in self.writers.items()},
            files=files,
        )
        sealed = {"state": document, "sha256": _sha256(json.dumps(document))}
        _replace_file(self._json(finished), json.dumps(sealed))
        for other in set(self._numbers()) - {finished}:
            self._json(other).unlink()
            for old in self.folder.glob(f"{other}-*.safetensors"):
                old.unlink()

    def _tensors(self, inputs: Mapping[str, list[Tensor]]) -> Iterator[tuple[str, Tensor]]:
        number, count = self.processes.number, self.processes.count
        for walk, hidden in inputs.items():
            for at, one in enumerate(hidden):
                yield f"{walk}/{at * count + number}", one
        for name, writer in self.writers.items():
            yield from ((f"{_HELD}/{name}/{key}", one) for key, one in writer.held.items())

    def _read(self, number: int) -> tuple[int, _Document] | None:
        """Return a state whose digests match its files; None if one does not."""
        try:
            sealed = read_json(self._json(number), MAX_JSON_BYTES)
            document = cast(_Document, sealed["state"])
            valid = sealed["sha256"] == _sha256(json.dumps(document))
            for name, digest in document["files"].items():
                valid &= digest == file_sha256(self.folder / name)
            for name, state in document["writers"].items():
                valid &= self.writers[name].has_shards(state)
        except (UserError, OSError, KeyError, TypeError):
            return None
        return (number, document) if valid else None

    def _restore(self, document: _Document) -> None:
        """Give the writers their tensors, and the walks the inputs of this process."""
        held: dict[str, dict[str, Tensor]] = {name: {} for name in self.writers}
        inputs: dict[str, dict[int, Tensor]] = {walk: {} for walk in self._walks}
        for key, tensor in self._saved_tensors(document):
            kind, _, rest = key.partition("/")
            if kind == _HELD:
                owner, _, name = rest.partition("/")
                held[owner][name] = tensor
            else:
                inputs[kind][int(rest)] = tensor
        self._inputs = {
            walk: [found[number] for number in sorted(found)] for walk, found in inputs.items()
        }
        for name, writer in self.writers.items():
            writer.resume(document["writers"][name], held[name])

    def _saved_tensors(self, document: _Document) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a state, without the samples of other processes."""
        number, count = self.processes.number, self.processes.count
        for name in document["files"]:
            for key, tensor in _read_tensors(self.folder / name):
                if key.startswith(f"{_HELD}/") or int(key.rpartition("/")[2]) % count == number:
                    yield key, tensor


def _read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118
            yield key, tensors.get_tensor(key)


def delete_files(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete the files of an interrupted pass.

    :param keep: folders of states that are kept.
    """
    kept = [folder / STATES / name for name in keep]
    for file in folder.rglob("*"):
        if not file.is_dir() and not any(map(file.is_relative_to, kept)):
            file.unlink()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _replace_file(file: Path, text: str) -> None:
    """Write a file; it gets its name only when it is on the disk."""
    partial = file.with_suffix(".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(file)
