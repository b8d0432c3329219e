"""The loss of a microbatch, and the output layer in chunks of tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import unwrap_model
from megatron.training import get_args

from ..ops import linear_cross_entropy

_SPIKE = 10  # a loss this many times the largest one so far is reported with --check-for-spiky-loss


def loss_func(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Sum of the token losses, the number of tokens it is a sum of, and both for the log. Megatron divides."""
    args = get_args()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    tokens = mask.sum().detach().to(torch.int)

    rerun = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for reject, name in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            message = f"found {name} in local forward loss calculation"
            rerun.validate_result(result=loss, rejection_func=reject, message=message, tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        spike = partial(rerun.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        rerun.validate_result(result=loss, rejection_func=spike, message="Spiky loss", tolerance=0.0, fatal=False)
    return loss, tokens, {"lm loss": torch.cat([loss.detach().view(1), tokens.view(1)])}


def chunked_loss(
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    labels: torch.Tensor,
    scale_logits: Callable,
    context: int,
    backend: str | None = None,
    call: Callable | None = None,
    **_: Any,
) -> torch.Tensor:
    """The processor of ``output_processed``: the loss [b, s] as of its own function, ``context`` tokens at a time.

    It goes through the output layer's own call, whose hooks wait for its weight (--overlap-param-gather) and whose
    forward knows which weight, group and layout: only the product in it is another one, which returns losses instead of
    logits. ``backend`` is that of ``lightning_attn``; bind it with ``functools.partial``. ``call`` is the layer's
    forward where its hooks have run.

    Raises:
        ValueError: an output layer with bias, with sharded weights, with another dtype of logits than that of the
            hidden states, or with what a version of Megatron has that is not known here.
    """

    def product(
        input, weight, bias, sequence_parallel, tp_group, *, output_dtype=None, gtp_remat_size=1,
        # how Megatron's own product computes its gradients
        gradient_accumulation_fusion=False, allreduce_dgrad=False, grad_output_buffer=None, wgrad_deferral_limit=None,
        **unknown,
    ):  # fmt: skip
        if unknown:
            raise ValueError(
                f"--lightning-loss-chunk does not know {', '.join(unknown)}, which the output layer of this version of "
                "Megatron asks for: leave the flag out"
            )
        if bias is not None:
            raise ValueError(
                "--lightning-loss-chunk needs an output layer without bias: build it without, or leave the flag out"
            )
        if output_dtype not in (None, input.dtype):
            raise ValueError(
                f"--output-logit-dtype {output_dtype}: the logits of --lightning-loss-chunk have the dtype of hidden "
                f"states, {input.dtype}; leave out one of the two"
            )
        if gtp_remat_size > 1:
            raise ValueError(
                f"--tensor-parallel-num-weight-shards: the output layer's weight is sharded over {gtp_remat_size} "
                "ranks, and --lightning-loss-chunk needs it whole: leave out one of the two"
            )
        return linear_cross_entropy(
            input,
            weight,
            labels.transpose(0, 1),
            tp_group,
            chunk=context,
            sequence_parallel=sequence_parallel,
            backend=backend,
        )

    output_layer._forward_impl = product
    try:
        # scaled hidden states (--use-mup) make scaled logits
        loss, _ = (call or output_layer)(scale_logits(hidden_states), weight=output_weight, runtime_gather_output=False)
    finally:
        del output_layer._forward_impl
    return loss.transpose(0, 1).contiguous()


@contextlib.contextmanager
def output_processed(
    model: torch.nn.Module, processor: Callable, labels: torch.Tensor, context: Any = None
) -> Iterator[dict[str, Any]]:
    """Arguments with which ``model``'s forward returns what ``processor`` makes of its hidden states.

    They are GPTModel's ``output_processor``, and labels. HybridModel has no such argument: while this is open, its
    forward calls ``processor`` in place of the output layer. ``call`` is then the layer's own forward, for a processor
    that needs it.
    """
    whole = unwrap_model(model)
    if not isinstance(whole, HybridModel):
        yield {"labels": labels, "output_processor": processor, "output_processor_context": context}
        return
    if not whole.post_process:
        yield {"labels": labels}
        return
    layer = whole.output_layer
    given = dict(output_layer=layer, labels=labels, scale_logits=whole._scale_logits, context=context)

    def forward(hidden_states, weight=None, runtime_gather_output=None):
        call = partial(type(layer).forward, layer)
        return processor(hidden_states=hidden_states, output_weight=weight, call=call, **given), None

    layer.forward, whole._scale_logits = forward, lambda loss: loss
    whole.compute_language_model_loss = lambda labels, loss: loss
    try:
        yield {"labels": labels}
    finally:
        del layer.forward, whole._scale_logits, whole.compute_language_model_loss
