"""What the flags of data name: blends of files, and whether these are whole, before anything is built."""

from __future__ import annotations

import json
import os
import struct
from argparse import Namespace
from pathlib import Path

import numpy
from megatron.core.datasets.indexed_dataset import DType
from megatron.core.datasets.utils import get_blend_from_list

from ..flags import flag_of

FLAGS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_HEADER, _MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\0\0"  # magic, version, dtype, sequences, documents
_AGAIN = "copy it again, or write it anew (examples/prepare_data.py)"
_LOOK = 1 << 16  # tokens at the beginning of a dataset, which need not be slow to read


class DataError(ValueError):
    """Data that were read and cannot be trained on: what they are, and what to do."""


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
    """Refuse a dataset that is not whole, which Megatron finds out in a traceback, or at the first sample that is gone;
    and one of another tokenizer, with tokens that the embedding has no rows for, which a GPU finds out.

    Only rank 0 looks, at names, sizes, and the beginning of index and tokens.

    Raises:
        ValueError: naming the flag, the file and the remedy.
    """
    if args.rank or args.sft or args.mock_data or args.per_dataset_sequences_path:
        return
    for name, prefixes in blends(args):
        for prefix in prefixes:
            if "://" not in prefix and (fault := _fault(prefix, args.padded_vocab_size)):
                raise ValueError(f"{flag_of(name)} {prefix}: {fault}")


def _fault(prefix: str, rows: int) -> str | None:
    """What is wrong with ``prefix.idx`` and ``prefix.bin``, and what to do: the index has for every sequence its length
    (int32) and place (int64), and for every document its first sequence (int64). ``rows`` are those of the embedding.
    """
    index, data = prefix + ".idx", prefix + ".bin"
    try:
        with open(index, "rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size or not head.startswith(_MAGIC):
                return f"{index} is no index of a dataset; {_AGAIN}"
            _, _, code, sequences, documents = _HEADER.unpack(head)
            needed, size = _HEADER.size + 12 * sequences + 8 * documents, os.path.getsize(index)
            if size < needed:
                return f"{index} is cut off: it has {size} of {needed} bytes; {_AGAIN}"
            file.seek(_HEADER.size + 4 * max(sequences - 1, 0))
            (length,) = struct.unpack("<i", file.read(4))
            file.seek(_HEADER.size + 12 * sequences - 8)
            (place,) = struct.unpack("<q", file.read(8))
        dtype = DType.dtype_from_code(code)
        end, size = place + length * DType.size(dtype) if sequences else 0, os.path.getsize(data)
        if size < end:
            return f"{data} is cut off: it has {size} of {end} bytes; {_AGAIN}"
        tokens = numpy.fromfile(data, dtype, min(_LOOK, size // DType.size(dtype)))
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < rows:
            return (
                f"{data} has tokens from {tokens.min()} to {tokens.max()}, and this model those below {rows}: give the "
                "tokenizer that wrote it, or write it anew (examples/prepare_data.py)"
            )
    except (OSError, ValueError, struct.error) as error:
        return f"{error}; {_AGAIN}"
    return None
