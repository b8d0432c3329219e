"""Lightning layers in Megatron's HybridModel, whose ``--hybrid-layer-pattern`` names each sublayer by a letter.

``L`` is a lightning layer without its MLP, as ``*`` is softmax attention without one: ``L-L-L-*-`` is the model that
GPTModel calls four layers with ``--linear-attention-freq 4``, and computes the same. ``patches.hybrid_symbol`` teaches
Megatron the letter; this is what it then builds.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from .compat import check_megatron

check_megatron()

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module
    from megatron.core.transformer.transformer_layer import (
        BaseTransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )
    from megatron.core.utils import make_viewless_tensor

    from .compat import importable
    from .config import LightningOptions, mark_prepared, prepared_with
    from .layer import ChunkedLayer
    from .models.hybrid import FLAG
    from .norm import layer_norm_spec
    from .patches import hybrid_symbol
    from .patches.hybrid_symbol import LETTER, add_letter
    from .router_log import make_room
    from .runtime import prepare, training_args
    from .spec import get_hybrid_layer_specs
except ImportError as error:  # which Megatron would ignore
    raise RuntimeError(f"lightning_megatron.hybrid_model cannot be used, an import failed: {error}") from error

__all__ = ["LightningStack", "add_letter", "apply", "as_transformer", "checked", "make_stack_spec"]

_OF_TE = (Symbols.MAMBA, Symbols.GDN, Symbols.MLA)  # their parts in Megatron's stack are TransformerEngine's alone


def make_stack_spec(options: LightningOptions | None = None, **overrides: Any) -> ModuleSpec:
    """A stack spec for HybridModel, with other options of its lightning layers than the defaults.

    Args:
        options: all options at once, or
        overrides: single fields of :class:`LightningOptions`, on top of ``options``.

    Example::

        my_stack = make_stack_spec(decay="minimax", scale=1.0)  # in my_module: --spec my_module my_stack
    """
    options = dataclasses.replace(options or LightningOptions(), **overrides)
    return ModuleSpec(module=LightningStack, params={"options": options}, submodules=hybrid_stack_spec.submodules)


def apply() -> None:
    """Teach Megatron the letter. Call it before the command line is parsed."""
    hybrid_symbol.apply(lightning_stack)


def lightning_stack(config: Any, given: ModuleSpec, pattern: str) -> ModuleSpec:
    """The stack spec that builds ``pattern`` with the layers of ``given``, and lightning layers for ``L``."""
    if given.module not in (HybridStack, LightningStack):
        raise ValueError(
            f"{FLAG} {pattern}: {LETTER} needs Megatron's HybridStack, and this stack spec has {given.module}; give a "
            "spec of HybridStack, or make_stack_spec(...)"
        )
    options = (given.params or {}).get("options") or LightningOptions()
    return ModuleSpec(
        module=LightningStack, params={"options": options, "pattern": pattern}, submodules=given.submodules
    )


def checked(config: Any, options: LightningOptions, pattern: str) -> Any:
    """``as_transformer``, and refuses options that HybridModel cannot honour."""
    if options.mtp_attention != "softmax":
        raise ValueError(
            f"--lightning-mtp-attention {options.mtp_attention} is not supported in HybridModel, whose "
            f"{FLAG} says what stands behind /; leave it out, or use GPTModel and --mtp-num-layers"
        )
    main, _, ahead = pattern.partition(Symbols.MTP_SEPARATOR)
    if options.embedding_scale != 1.0 and (not main.startswith(LETTER) or ahead):
        raise ValueError(
            f"--lightning-embedding-scale {options.embedding_scale} is not supported with {FLAG} {pattern}: embeddings "
            f"are multiplied where they enter a first layer {LETTER}, and not in layers of multi-token prediction "
            f"(behind {Symbols.MTP_SEPARATOR}); begin the pattern with {LETTER} and put nothing behind "
            f"{Symbols.MTP_SEPARATOR}, leave the flag out, or use GPTModel"
        )
    if config.rotary_interleaved:
        raise ValueError(
            "--rotary-interleaved is not supported in HybridModel: Megatron (0.19, and main) makes its angles for the "
            "other order, so that both channels of a pair would turn by different ones; leave it out, or use GPTModel"
        )
    return as_transformer(config, pattern)


def as_transformer(config: Any, pattern: str) -> Any:
    """The config of the GPTModel that a pattern comes closest to: a layer is an attention and what follows it.

    Flags are checked, layers counted and decays computed by it, so that they are those of GPTModel. Layers of other
    kinds (Mamba, gated delta net) count as layers that are not lightning.

    Raises:
        ValueError: a pattern that cannot be built.
    """
    main, _, ahead = pattern.partition(Symbols.MTP_SEPARATOR)
    layers = main.replace(Symbols.PIPE, "")
    _refuse(config, layers, ahead)
    attentions = [letter for letter in layers if letter not in (Symbols.MLP, Symbols.MOE)]
    view = copy.copy(config)
    view.num_layers = len(attentions)
    view.linear_attention_freq = [int(letter == LETTER) for letter in attentions]
    # With experts behind an attention or not; what stands before the first one goes with it.
    blocks = [""]
    for letter in layers:
        if letter in attentions and set(blocks[-1]) & set(attentions):
            blocks.append("")
        blocks[-1] += letter
    view.moe_layer_freq = [int(Symbols.MOE in block) for block in blocks]
    view.hybrid_layer_pattern = layers
    return view


def _refuse(config: Any, layers: str, ahead: str) -> None:
    if LETTER not in layers:
        raise ValueError(f"{FLAG} {layers} has no lightning layer ({LETTER}); train it with Megatron's own script")
    te = importable("transformer_engine.pytorch")
    for letter in _OF_TE:
        if letter in layers and not te:
            raise ValueError(
                f"{FLAG} {layers}: {letter} has parts of TransformerEngine, which does not import: install "
                f"transformer_engine[pytorch], or use {LETTER}, *, - and E"
            )
    if Symbols.DS_ATTENTION in layers:
        raise ValueError(f"{FLAG} {layers}: {Symbols.DS_ATTENTION} is not supported beside {LETTER}; use * or +")
    if Symbols.MOE in layers and not config.num_moe_experts:
        raise ValueError(f"{FLAG} {layers}: E needs --num-experts")
    # A checkpoint brings the numbers of what stands behind / also to runs that leave it out, as inference does.
    brought = getattr(training_args(), "use_checkpoint_args", False)
    if config.num_moe_experts and Symbols.MOE not in layers + ahead and not brought:
        raise ValueError(
            f"--num-experts {config.num_moe_experts}, but {FLAG} {layers} has no experts ({Symbols.MOE}), which it "
            f"places: put {Symbols.MOE} for some MLPs, or leave --num-experts out"
        )
    if config.mtp_num_layers and not ahead and not brought:
        raise ValueError(
            f"--mtp-num-layers {config.mtp_num_layers}, but {FLAG} {layers} has no layers of multi-token prediction, "
            f"which stand behind {Symbols.MTP_SEPARATOR} in it: leave --mtp-num-layers out, or use GPTModel"
        )
    if LETTER in ahead:
        raise ValueError(
            f"{FLAG}: layers of multi-token prediction (behind /) cannot be lightning in HybridModel; use * there, or "
            "GPTModel with --mtp-num-layers and --lightning-mtp-attention lightning"
        )
    if ahead and not te:
        raise ValueError(
            f"{FLAG}: multi-token prediction (behind /) has parts of TransformerEngine, which does not import: leave "
            "it out, or use GPTModel and --mtp-num-layers"
        )
    if config.linear_attention_freq is not None:
        raise ValueError(
            f"--linear-attention-freq {config.linear_attention_freq} and {FLAG} both place layers: leave the first out"
        )


class LightningStack(HybridStack):
    """Megatron's stack of layers, which also builds lightning ones.

    Where the stack spec is Megatron's own, softmax attention (``*``), MLPs (``-``) and experts (``E``) are those of
    ``spec.lightning_spec``, which do without TransformerEngine; so is the final norm. In a spec of the caller's own,
    only ``L`` is added.

    Args:
        pattern: of the whole model, as ``--hybrid-layer-pattern`` has it.
        others: as of HybridStack.
    """

    def __init__(
        self,
        config,
        submodules,
        *args: Any,
        layer_type_list: list[str],
        options: LightningOptions | None = None,
        pattern: str | None = None,
        post_layer_norm: bool = True,
        **kwargs: Any,
    ):
        if pattern is None:
            raise RuntimeError(
                f"this stack spec is for patterns with {LETTER} under python -m lightning_megatron.run, which tells it "
                f"the pattern; for patterns without {LETTER} use Megatron's"
            )
        options = options or LightningOptions()
        view = checked(config, options, pattern)
        layout = prepare(view, options)
        mark_prepared(config, prepared_with(view))
        ours = submodules is hybrid_stack_spec.submodules
        submodules, lightning, first = _layers(view, options, layout, submodules, ours)
        places: dict[int, ModuleSpec] = {}
        for number, letter in enumerate(view.hybrid_layer_pattern, start=1):
            if letter == LETTER:
                places[number] = _at(first if number == 1 else lightning, view, number)
        attention = ModuleSpec(module=_Attention, params={"places": places, "other": submodules.attention_layer})
        super().__init__(
            config,
            dataclasses.replace(submodules, attention_layer=attention),
            *args,
            layer_type_list=[Symbols.ATTENTION if letter == LETTER else letter for letter in layer_type_list],
            post_layer_norm=post_layer_norm and not ours,
            **kwargs,
        )
        self.layer_type_list = layer_type_list
        if Symbols.MOE in pattern:
            make_room(config)
        if ours:
            self.post_layer_norm = post_layer_norm
            if self.post_process and post_layer_norm:
                norm = layer_norm_spec(config, options, final=True)
                self.final_norm = build_module(
                    norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
                )

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """As of HybridStack; but ``--distribute-saved-activations`` cuts the input of a layer in place, and so it must
        be no view of another tensor, as GPTModel makes it."""
        if self.config.distribute_saved_activations and self.training:
            if self.pre_process:
                hidden_states = _no_view(hidden_states)
            else:
                self.input_tensor = _no_view(self.input_tensor)
        return super().forward(hidden_states, *args, **kwargs)


def _no_view(hidden_states: torch.Tensor) -> torch.Tensor:
    return make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)


class ChunkedMLP(ChunkedLayer, MLPLayer):
    """``layer.ChunkedLayer`` of an MLP that is a layer by itself."""


class _Attention(BaseTransformerLayer):
    """Builds the lightning layer of a place, or the layer of all other places."""

    def __new__(cls, config, layer_number: int, places: dict[int, ModuleSpec], other: ModuleSpec, **arguments: Any):
        return build_module(places.get(layer_number, other), config=config, layer_number=layer_number, **arguments)


def _layers(
    view: Any, options: LightningOptions, layout: str, submodules: Any, ours: bool
) -> tuple[Any, ModuleSpec, ModuleSpec]:
    """Submodules of the stack, the lightning layer, and that which the embeddings enter: halves of the layers of
    ``spec.get_hybrid_layer_specs``.
    """
    pair, count = copy.copy(view), max(2, view.num_layers)  # the first and the last of so many
    last = int(Symbols.ATTENTION not in view.hybrid_layer_pattern)
    pair.num_layers, pair.linear_attention_freq = count, [*[1] * (count - 1), last]
    pair.moe_layer_freq = [0] * count
    first = get_hybrid_layer_specs(pair, options, layout=layout)[0]
    options = dataclasses.replace(options, embedding_scale=1.0)  # of the first layer alone
    lightning, *_, softmax = get_hybrid_layer_specs(pair, options, layout=layout)
    if ours:
        submodules = dataclasses.replace(
            submodules, attention_layer=_attention_half(softmax), mlp_layer=_mlp_half(lightning, MLPLayer, ChunkedMLP)
        )
        if Symbols.MOE in view.hybrid_layer_pattern:
            pair.moe_layer_freq = [1] * count
            whole = dataclasses.replace(options, recompute_chunk=None)
            experts = get_hybrid_layer_specs(pair, whole, layout=layout)[0]
            submodules = dataclasses.replace(submodules, moe_layer=_mlp_half(experts, experts.module))
    return submodules, *(_attention_half(spec, ChunkedLayer) for spec in (lightning, first))


def _half(spec: ModuleSpec, module: type, *parts: str, chunked: type | None = None) -> ModuleSpec:
    """``module`` with some of the submodules of a layer; ``chunked`` where the layer is recomputed in chunks."""
    kept = {name: getattr(spec.submodules, name) for name in (*parts, "sharded_state_dict_keys_map")}
    submodules = TransformerLayerSubmodules(**kept)
    if chunked and spec.module is ChunkedLayer:
        return ModuleSpec(module=chunked, params=spec.params, submodules=submodules)
    return ModuleSpec(module=module, submodules=submodules)


def _attention_half(spec: ModuleSpec, chunked: type | None = None) -> ModuleSpec:
    return _half(spec, TransformerLayer, "input_layernorm", "self_attention", "self_attn_bda", chunked=chunked)


def _mlp_half(spec: ModuleSpec, module: type, chunked: type | None = None) -> ModuleSpec:
    return _half(spec, module, "pre_mlp_layernorm", "mlp", "mlp_bda", chunked=chunked)


def _at(lightning: ModuleSpec, view: Any, number: int) -> ModuleSpec:
    """The lightning layer ``number`` of the pattern: its decay counts attentions, as in GPTModel."""
    before = view.hybrid_layer_pattern[: number - 1]
    index = sum(letter not in (Symbols.MLP, Symbols.MOE) for letter in before)
    attention = lightning.submodules.self_attention
    placed = dataclasses.replace(attention, params={**attention.params, "depth": (index, view.num_layers)})
    return dataclasses.replace(lightning, submodules=dataclasses.replace(lightning.submodules, self_attention=placed))
