"""A Hugging Face folder: config.json, tensors of all *.safetensors, and the small files beside them."""

from __future__ import annotations

import json
import re
import struct
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from . import fp8
from .errors import ConvertError, UsageError, cannot

_WEIGHTS = re.compile(r"\.(safetensors|safetensors\.index\.json|bin|bin\.index\.json|pt|pth|gguf|h5|msgpack|onnx)$")
_SMALL = 256 << 20  # bytes: the largest tokenizers have 30 MB


class Stored(NamedTuple):
    """A tensor as it is read; of an fp8 weight, ``dtype`` is what it is dequantized to."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scaled: bool = False

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def local_folder(path: Path) -> Path:
    """The folder, absolute and without links.

    Raises:
        UsageError: there is none, as for the name of a repository or a URL.
    """
    if not path.is_dir():
        what = "is no folder" if path.exists() else "there is no such folder"
        raise UsageError(
            f"{path}: {what}; only local folders are taken: download a model first, for example with "
            "`hf download ORG/NAME --local-dir FOLDER`"
        )
    return path.resolve()


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config.json.

    Raises:
        ConvertError: no such file, or not a JSON object.
    """
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise ConvertError(
            f"{path.parent} holds no config.json: give a folder as `hf download ORG/NAME --local-dir FOLDER` or "
            "save_pretrained() leaves it"
        ) from error
    except OSError as error:
        raise cannot("read", path, error) from error
    except ValueError as error:
        raise ConvertError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(config, dict):
        raise ConvertError(f"{path} must hold a JSON object, but holds a {type(config).__name__}")
    return config


def small_files(folder: Path) -> list[Path]:
    """Tokenizer, generation config, code and the like: all files of a folder but weights, hidden and huge ones."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [path for path in files if not _WEIGHTS.search(path.name) and path.stat().st_size <= _SMALL]


class Folder:
    """The tensors of a Hugging Face folder, memory-mapped: ``read`` costs no memory until the values are used.

    Args:
        path: folder with config.json and *.safetensors.

    Attributes:
        config: config.json.
        tensors: every tensor by its name; scales of fp8 weights belong to their weights and are not listed.

    Raises:
        ConvertError: naming file and tensor: a file that is missing or truncated, a tensor that two files hold or that
            the index misplaces, scales without weights.
    """

    def __init__(self, path: Path) -> None:
        self.path = local_folder(path)
        self.config = read_config(self.path / "config.json")
        try:
            self.block = fp8.block_size(self.config)
        except ValueError as error:
            raise ConvertError(f"{self.path / 'config.json'}: {error}") from error
        self._files: dict[str, Any] = {}
        self._lock = threading.Lock()
        indexed = self._index()
        names = sorted({file.name for file in self.path.glob("*.safetensors")} | set(indexed.values()))
        if not names:
            raise ConvertError(
                f"{self.path} holds no *.safetensors; load another format with transformers and save_pretrained() it"
            )
        stored: dict[str, Stored] = {}
        for name in names:
            for tensor, what in self._scan(name, indexed).items():
                if tensor in stored:
                    raise ConvertError(
                        f"tensor {tensor} is in two files of {self.path}, {stored[tensor].file} and {name}: "
                        "remove the file that does not belong there"
                    )
                stored[tensor] = what
        for tensor, file in indexed.items():
            if tensor not in stored or stored[tensor].file != file:
                there = f"which lies in {stored[tensor].file}" if tensor in stored else "which no file holds"
                raise ConvertError(f"the index of {self.path} names {file} for tensor {tensor}, {there}")
        self.tensors = self._join_scales(stored)

    def read(self, name: str) -> torch.Tensor:
        """A tensor, as a view of the mapped file unless it is dequantized."""
        what = self.tensors[name]
        tensor = self._get(what.file, name)
        if not what.scaled:
            return tensor
        assert self.block is not None
        return fp8.dequantize(tensor, self._get(self._scales[name], name + fp8.SCALE), self.block)

    def state(self) -> dict[str, list[int]]:
        """Size and modification time of each file that is read: tells whether a folder has changed."""
        names = sorted({"config.json", *self._files, *(path.name for path in small_files(self.path))})
        return {name: [(stat := (self.path / name).stat()).st_size, stat.st_mtime_ns] for name in names}

    def leave_out(self, names: Collection[str], **fields: Any) -> int:
        """Take tensors for absent, and ``fields`` for those of config.json; how many tensors there were."""
        kept = {name: what for name, what in self.tensors.items() if name not in names}
        count, self.tensors = len(self.tensors) - len(kept), kept
        self.config |= fields
        return count

    # ---- files -----------------------------------------------------------------------------------------------------

    def _index(self) -> dict[str, str]:
        """File of each tensor by the index, {} without one."""
        indexed: dict[str, str] = {}
        for path in sorted(self.path.glob("*.safetensors.index.json")):
            files = read_config(path).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
                raise ConvertError(f"{path} has no weight_map of tensor names to file names; download it again")
            indexed |= files
        return indexed

    def _scan(self, name: str, indexed: dict[str, str]) -> dict[str, Stored]:
        path = self.path / name
        if not path.is_file():
            lost = [tensor for tensor, file in indexed.items() if file == name]
            raise ConvertError(
                f"{path} is missing; the index names it for {len(lost)} tensors, the first {lost[0]}: download it again"
            )
        try:
            file = self._files[name] = safe_open(path, "pt")
            tensors = {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118, no mapping
        except OSError as error:
            raise cannot("read", path, error) from error
        except SafetensorError as error:
            raise ConvertError(f"{path} {_damage(path) or f'is damaged: {error}'}; download it again") from error
        return {tensor: Stored(name, value.dtype, tuple(value.shape)) for tensor, value in tensors.items()}

    def _get(self, file: str, name: str) -> torch.Tensor:
        with self._lock:
            tensor: torch.Tensor = self._files[file].get_tensor(name)
        return tensor

    # ---- fp8 -------------------------------------------------------------------------------------------------------

    def _join_scales(self, stored: dict[str, Stored]) -> dict[str, Stored]:
        """The tensors without the scales, fp8 weights as bf16."""
        self._scales: dict[str, str] = {}
        tensors: dict[str, Stored] = {}
        for name, what in stored.items():
            if name.endswith(fp8.SCALE) and (weight := stored.get(name.removesuffix(fp8.SCALE))):
                if weight.dtype == fp8.DTYPE:
                    continue
            if what.dtype == fp8.DTYPE:
                self._check_scale(name, what, stored.get(name + fp8.SCALE))
                self._scales[name] = stored[name + fp8.SCALE].file
                what = what._replace(dtype=torch.bfloat16, scaled=True)
            tensors[name] = what
        return tensors

    def _check_scale(self, name: str, weight: Stored, scale: Stored | None) -> None:
        where = f"tensor {name} of {self.path / weight.file}"
        if self.block is None:
            raise ConvertError(
                f"{where} is float8_e4m3fn, but config.json has no quantization_config.weight_block_size"
            )
        if scale is None:
            raise ConvertError(f"{where} is float8_e4m3fn, but {name + fp8.SCALE} is missing")
        expected = fp8.scale_shape(weight.shape, self.block) if len(weight.shape) > 1 else None
        if scale.shape != expected:
            raise ConvertError(
                f"{where} has shape {list(weight.shape)}, and {name + fp8.SCALE} has shape {list(scale.shape)}; with "
                f"blocks of {list(self.block)} it must have {list(expected) if expected else 'at least two dimensions'}"
            )


def _damage(path: Path) -> str | None:
    """What is wrong with a file that the library refused, with the tensor where it ends too early."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) < 8 or size < 8 + length:
            return f"is truncated in its header: it has {size} bytes"
        try:
            header = json.loads(file.read(length))
            ends = {name: 8 + length + what["data_offsets"][1] for name, what in header.items() if "dtype" in what}
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
    cut = sorted((end, name) for name, end in ends.items() if end > size)
    return f"is truncated in tensor {cut[0][1]}: it has {size} of {cut[-1][0]} bytes" if cut else None
