"""Safetensors files: where each tensor lies, and its bytes.

A header is trusted only if it agrees with the size of its file.

Tensors are read, not mapped: a mapped file would count as resident memory beside the weights. Must not know models, nor
torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# By the format's name of a dtype: torch's name, and bytes of one number.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file: ``nbytes`` bytes from byte ``offset`` on, row-major, little-endian; ``dtype`` by torch's
    name.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises ``ValueError`` naming the file and the position of the fault."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_object_without_duplicates)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
        raise ValueError(f"{path} is not valid JSON (half-written?): {error}") from None


Headers = Mapping[str, dict[str, TensorInfo]]  # by the name of the file


def read_weight_set(directory: Path, stem: str, remote: Headers | None = None) -> dict[str, TensorInfo]:
    """The tensors of ``stem.safetensors``, or else of the shards that ``stem.safetensors.index.json`` names.

    remote: the headers of files that lie elsewhere, to be used in place of those in ``directory``. Raises
    ``ValueError`` (``FileNotFoundError`` for an absent shard) where index and files disagree, a file is cut off, or an
    index leaves its directory.
    """
    single = f"{stem}.safetensors"
    if remote is not None and single in remote:
        return remote[single]
    if (directory / single).exists():
        return read_header(directory / single)
    index_file = directory / f"{stem}.safetensors.index.json"
    index = read_json(index_file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_file} has no weight_map")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise ValueError(f"{index_file}: tensor {name} must lie in a file of the same directory, got {file!r}")
        files.setdefault(file, []).append(name)
    absent = sorted(file for file in files if not ((directory / file).is_file() if remote is None else file in remote))
    if absent:
        raise FileNotFoundError(
            f"{index_file} names {len(files)} files, and {len(absent)} of them are absent: {', '.join(absent)}"
        )
    tensors: dict[str, TensorInfo] = {}
    for file, names in sorted(files.items()):
        header = read_header(directory / file) if remote is None else remote[file]
        for name in names:
            if name not in header:
                raise ValueError(f"{index_file} places tensor {name} in {file}, which does not hold it")
        for name in header:
            if name in tensors:
                raise ValueError(f"tensor {name} is in both {tensors[name].file} and {directory / file}")
        tensors |= header
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, from its header alone. Raises ``ValueError`` if header and file size do not agree."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(24)
        if start == b"version https://git-lfs.":
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself: fetch it with 'git lfs pull'")
        if len(start) < 8:
            raise ValueError(f"{path} is cut off: it has {size} bytes, fewer than the 8 that start a safetensors file")
        (length,) = struct.unpack("<Q", start[:8])
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file: it claims a header of {length} bytes")
        if 8 + length > size:
            raise ValueError(f"{path} is cut off: its header takes {8 + length} bytes, and the file has {size}")
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a broken safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a broken safetensors header: it is not an object")
    return tensors_of_header(path, header, 8 + length, size)


def tensors_of_header(path: Path, header: dict[str, Any], data_start: int, size: int | None) -> dict[str, TensorInfo]:
    """The tensors of a header whose data begin at byte ``data_start`` of a file of ``size`` bytes; None if the size is
    not known.
    """
    tensors = {
        name: _tensor_info(path, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"
    }
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise ValueError(f"{path}: tensor {name} starts at byte {info.offset}, and the one before ends at {end}")
        end += info.nbytes
    if size is not None and end != size:
        state = "cut off" if end > size else "damaged"
        raise ValueError(f"{path} is {state}: its tensors end at byte {end}, and the file has {size}")
    return tensors


def read_into(info: TensorInfo, buffer: memoryview, begin: int = 0) -> None:
    """Fill ``buffer`` with a tensor's bytes from ``begin`` on. Raises ``ValueError`` at an early end."""
    assert 0 <= begin and begin + len(buffer) <= info.nbytes, (begin, len(buffer), info.nbytes)
    start = info.offset + begin
    with info.file.open("rb", buffering=0) as file:
        file.seek(start)
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done:])  # at most 2 GiB at a time
            if not count:
                raise ValueError(f"{info.file} is cut off: byte {start + done} cannot be read")
            done += count


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{path} has a broken safetensors header: tensor {name} is {entry!r}")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{path}: tensor {name} has dtype {dtype!r}, which is not supported")
    if not _is_counts(shape) or not _is_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{path} has a broken safetensors header: tensor {name} has shape {shape}, offsets {offsets}")
    torch_name, itemsize = _DTYPES[dtype]
    nbytes = prod(shape) * itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(
            f"{path}: tensor {name} of {dtype} {list(shape)} takes {nbytes} bytes, and its offsets {offsets} "
            f"span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(path, torch_name, tuple(shape), nbytes, data_start + offsets[0])


def _is_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is there twice")
    return result
