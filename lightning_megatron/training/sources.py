"""What the flags of data name: blends of files, and whether these are whole, before anything is built."""

from __future__ import annotations

import json
import os
import struct
from argparse import Namespace
from pathlib import Path

from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import get_blend_from_list

from ..flags import flag_of

FLAGS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_HEADER, _MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\0\0"  # magic, version, dtype, sequences, documents
_AGAIN = "copy it again, or write it anew (examples/prepare_data.py)"


def blends(args: Namespace) -> list[tuple[str, list[str]]]:
    """Attribute of the flag and prefixes, for each blend that the flags and the files they name ask for.

    Files elsewhere than in a file system are left to Megatron.

    Raises:
        ValueError: a file that cannot be read, or weights and paths that are not in turn.
    """
    found = [(name, getattr(args, name)) for name in FLAGS]
    for attribute in ("data_args_path", "per_split_data_args_path"):
        path = getattr(args, attribute)
        if path is not None and "://" not in path:
            found += [(attribute, words) for words in _listed(attribute, path)]
    return [(name, _prefixes(flag_of(name), words)) for name, words in found if words]


def _listed(attribute: str, path: str) -> list[list[str]]:
    try:
        text = Path(path).read_text("utf-8")
        if attribute == "data_args_path":
            return [text.split()]
        parts = [json.loads(text)[name] for name in ("train", "valid", "test")]
        return [part.split() if isinstance(part, str) else [*(part or ())] for part in parts]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = (
            "paths and weights, with spaces in between"
            if attribute == "data_args_path"
            else 'JSON such as {"train": ["1", "PREFIX"], "valid": ["1", "PREFIX"], "test": null}'
        )
        raise ValueError(
            f"{flag_of(attribute)} {path}: cannot be read ({type(error).__name__}: {error}); give a file with {wanted}"
        ) from error


def _prefixes(flag: str, words: list[str]) -> list[str]:
    try:
        prefixes, weights = get_blend_from_list(words)
    except AssertionError:  # some words where weights should be are numbers
        prefixes, weights = [], [-1.0]
    if weights is not None and not (min(weights) >= 0 and 0 < sum(weights) < float("inf")):
        raise ValueError(
            f"{flag} {' '.join(words)}: give paths, or a weight before each path, no weight below 0 and not all 0"
        )
    return prefixes


def refuse_broken(args: Namespace) -> None:
    """Refuse a dataset that is not whole, which Megatron finds out in a traceback, or at the first sample that is gone.

    Only rank 0 looks, at names, sizes and the beginning of the index.

    Raises:
        ValueError: naming the flag, the file and the remedy.
    """
    if args.rank or args.sft or args.mock_data or args.per_dataset_sequences_path:
        return
    for name, prefixes in blends(args):
        for prefix in prefixes:
            if "://" not in prefix and (fault := _fault(prefix)):
                raise ValueError(f"{flag_of(name)} {prefix}: {fault}; {_AGAIN}")


def _fault(prefix: str) -> str | None:
    """What is wrong with ``prefix.idx`` and ``prefix.bin``: the index has for every sequence its length (int32) and
    place (int64), and for every document its first sequence (int64).
    """
    index, data = prefix + ".idx", prefix + ".bin"
    try:
        with open(index, "rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or not head.startswith(_MAGIC):
                return f"{index} is no index of a dataset"
            _, _, code, sequences, documents = _HEADER.unpack(head)
            needed, size = _HEADER.size + 12 * sequences + 8 * documents, os.path.getsize(index)
            if size < needed:
                return f"{index} is cut off: it has {size} of {needed} bytes"
            file.seek(_HEADER.size + 4 * max(sequences - 1, 0))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(_HEADER.size + 12 * sequences - 8)
            (place,) = struct.unpack("<q", file.read(8))
        end = place + length * DType.size(DType.dtype_from_code(code)) if sequences else 0
        size = os.path.getsize(data)
        return f"{data} is cut off: it has {size} of {end} bytes" if size < end else None
    except (OSError, ValueError, struct.error) as error:
        return str(error)
