"""What runs a Hugging Face folder without this package's layers: transformers where it has the model, else formulas.

No code of a folder is executed, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.hooks import RemovableHandle

from . import reference
from .errors import ConvertError
from .folder import Folder

Outputs = tuple[list[torch.Tensor], torch.Tensor]


class Independent(Protocol):
    """A model that can be asked for its outputs."""

    name: str  # for people
    margins: torch.Tensor | None  # [t], by how much its experts were chosen in the first call of ``outputs``

    def memory(self) -> int:
        """Bytes that it will hold, at most."""

    def outputs(self, tokens: Sequence[int]) -> Outputs:
        """Output of every layer [t, h], and logits [t, vocabulary]."""


def model_of(folder: Folder) -> Independent:
    """The best there is for a folder.

    Raises:
        ConvertError: there is none, or it is not installed.
    """
    if _transformers_has_it(folder.config):
        return _Transformers(folder)
    return _Formulas(folder)


def _transformers_has_it(config: dict[str, Any]) -> bool:
    """Its MiniMax rotates all channels of a head, and reads neither the released field names nor fp8 here."""
    dim = config.get("head_dim")
    whole = config.get("rotary_dim") in (None, dim)
    return config.get("model_type") == "minimax" and whole and "quantization_config" not in config


class _Transformers:
    margins: torch.Tensor | None = None

    def __init__(self, folder: Folder) -> None:
        try:
            import transformers
        except ModuleNotFoundError as error:
            raise ConvertError(
                f"the reference of {folder.path} is transformers, which is not installed: pip install transformers; or "
                "compare only tensors, with --tensors-only"
            ) from error
        self.name = f"transformers {transformers.__version__}, MiniMaxForCausalLM, fp32"
        self._folder = folder
        self._model: Any = None

    def memory(self) -> int:
        return 4 * sum(torch.Size(stored.shape).numel() for stored in self._folder.tensors.values())

    def outputs(self, tokens: Sequence[int]) -> Outputs:
        model = self._model = self._model or _load(self._folder.path)
        states: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda module, inputs, output: states.append(output[0].clone()))
            for layer in model.model.layers
        ]
        hooks += note_margins_of(model)
        try:
            with torch.inference_mode(), reference.choice_margins() as margins:
                logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        self.margins = _smallest(margins) if self.margins is None else self.margins
        return states, logits


def note_margins_of(model: torch.nn.Module) -> list[RemovableHandle]:
    """Let the routers of transformers' MiniMax report to ``reference.choice_margins``; the hooks."""
    from transformers.models.minimax.modeling_minimax import MiniMaxTopKRouter

    return [
        module.register_forward_hook(
            lambda module, inputs, outputs: reference.note_margin(outputs[0].softmax(-1), module.top_k)
        )
        for module in model.modules()
        if isinstance(module, MiniMaxTopKRouter)
    ]


def _load(path: Path) -> Any:
    from transformers import MiniMaxForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        loaded: Any = MiniMaxForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=torch.float32,
            experts_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:
        raise ConvertError(f"transformers does not load {path}: {error}") from error
    model, report = loaded
    wrong = [f"{kind}: {', '.join(sorted(map(str, names))[:5])}" for kind, names in report.items() if names]
    if wrong:
        raise ConvertError(f"transformers does not load all of {path}: {'; '.join(wrong)}")
    return model.eval()


class _Formulas:
    name = "formulas in plain PyTorch (lightning_megatron.convert.reference), fp64"

    def __init__(self, folder: Folder) -> None:
        try:
            self._function = reference.model_of(folder.config)
        except ValueError as error:
            raise ConvertError(f"{folder.path / 'config.json'}: {error}; compare with --tensors-only") from error
        self._folder = folder
        self._tensors = _Double(folder)
        self.margins: torch.Tensor | None = None

    def memory(self) -> int:
        largest = max((torch.Size(stored.shape).numel() for stored in self._folder.tensors.values()), default=0)
        return 2 * 8 * largest

    @torch.inference_mode()
    def outputs(self, tokens: Sequence[int]) -> Outputs:
        try:
            with reference.choice_margins() as margins:
                states, logits = self._function(self._folder.config, self._tensors, torch.tensor([list(tokens)]))
        except KeyError as error:
            raise ConvertError(f"{self._folder.path} lacks {error}, which the reference needs") from error
        self.margins = _smallest(margins) if self.margins is None else self.margins
        layers = self._folder.config.get("num_hidden_layers", len(states))  # not those of multi-token prediction
        return [state[0] for state in states[:layers]], logits[0]


def _smallest(margins: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(margins).amin(0) if margins else None


class _Double(Mapping[str, torch.Tensor]):
    """The tensors of a folder in fp64, each read when it is used: the model never is in memory."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._folder.tensors:
            raise KeyError(name)
        return self._folder.read(name).double()

    def __iter__(self) -> Iterator[str]:
        return iter(self._folder.tensors)

    def __len__(self) -> int:
        return len(self._folder.tensors)
