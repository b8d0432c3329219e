"""The operator over ranks: validation, consistency check, autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from .. import ops
from ..ops import backend as backends
from ..ops import checks
from ..ops.once import once_differentiable
from . import recompute
from .chunks import DocumentStates, Rows, chunks_of
from .consistency import Values, check_consistency, check_divisible, tokens_of_ranks
from .exchange import EXCHANGES, choose, destination_for, exchange, needed_pairs
from .factors import Factors, decay_factors
from .layout import LAYOUTS
from .plan import ParallelPlan
from .ranges import marked


def lightning_attn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    group: dist.ProcessGroup | None,
    layout: str = "zigzag",
    tokens: Sequence[int] | None = None,
    exchange: str = "auto",
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``lightning_megatron.ops.lightning_attn`` of a sequence whose tokens are spread over the ranks of ``group``.

    Args:
        q, k, v, log_decay, scale, backend: as of ``lightning_megatron.ops.lightning_attn``; tokens are this rank's.
        group: the P ranks, each calling with the same arguments but for the tokens. Size 1, or
            None, is the operator itself.
        layout: where the tokens are. ``"contiguous"``: rank r holds chunk r of P. ``"zigzag"``: the sequence is cut
            into 2P equal chunks, and rank r holds chunk r and then chunk 2P-1-r, which is how Megatron balances causal
            softmax attention. ``"zigzag-documents"``: every document by itself is cut so (its length is a multiple of
            2P), as by TransformerEngine's ``thd_get_partitioned_indices``.
        tokens: of every rank, where contiguous chunks differ in length; the same on all ranks.
        exchange: ``"direct"`` (GPUs of one node write into each other's memory), ``"all-gather"``, ``"ring"``,
            ``"pipelined"``, ``"scan"`` (prefix sums by doubling), or ``"auto"``: direct where it is possible, else
            the cheapest for so many ranks, ranks of a node and bytes of states (cost.py).
        initial_state: as of the operator, of the whole sequence (or of whole documents) and the same on all ranks.
        output_final_state: also return the final state of the whole sequence (of every whole document), on all ranks.
            Its gradient must then be the same on all ranks, and that of initial_state is.
        cu_seqlens: bounds of the documents in the whole sequence, the same on all ranks; may cross chunks anywhere.

    Returns:
        ``(o, final_state)``: o of this rank's tokens.

    Raises:
        ValueError: what the operator raises, an unknown layout or exchange, tokens that cannot be this layout, or, on
            every rank and with the same message, ranks whose arguments differ where they must not, values of log_decay
            and cu_seqlens and the need of gradients included. The ranks compare them whenever an argument or a tensor
            is new on this rank (see ``check_consistency``): keep log_decay, and cu_seqlens of a batch, as one tensor
            object. An argument that is new on some ranks only ends in the group's timeout, and a value that changes
            without raising ``tensor._version`` on a GPU is not compared again.
    """
    for name, value, known in (("layout", layout, LAYOUTS), ("exchange", exchange, EXCHANGES)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if isinstance(group, int):  # torch's NON_GROUP_MEMBER
        raise ValueError(
            f"group={group} is what dist.new_group returns on ranks outside of the group; call on its ranks alone, or "
            "pass None for the operator on one rank"
        )
    options: dict[str, Any] = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
    if layout == "zigzag-documents" and cu_seqlens is None:
        raise ValueError(
            "layout='zigzag-documents' needs cu_seqlens, the bounds of the documents; or use layout='zigzag'"
        )
    if group is None or group.size() == 1:
        return ops.lightning_attn(q, k, v, log_decay, output_final_state=output_final_state, backend=backend, **options)
    checks.check_shapes(q, k, v, log_decay, **options)
    tokens = tokens_of_ranks(q.shape[1], group, layout, tokens)
    computing = backends.choose(backend, q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    check = functools.partial(_check_bounds, sum(tokens), 2 * group.size() if layout == "zigzag-documents" else 1)
    values = [
        Values("log_decay", log_decay, checks.check_log_decay),
        Values("cu_seqlens", cu_seqlens, check, (sum(tokens), layout)),
    ]
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, initial_state))
    check_consistency(
        group, q.device, values, operator="lightning_attn",
        tokens=q.shape[1] if len(set(tokens)) == 1 else tuple(tokens), B=q.shape[0], H=q.shape[2], Hkv=k.shape[2],
        K=k.shape[3], V=v.shape[3], dtype=q.dtype, layout=layout, exchange=exchange, scale=scale,
        backend=computing.NAME, documents=0 if cu_seqlens is None else cu_seqlens.numel() - 1,
        initial_state=initial_state is not None, output_final_state=output_final_state,
        gradients=learns,
    )  # fmt: skip
    rows = cu_seqlens.numel() - 1 if layout == "zigzag-documents" and cu_seqlens is not None else q.shape[0]
    exchange = choose(
        exchange, layout, group, q.device, computing, state_bytes=4 * rows * q.shape[2] * q.shape[3] * v.shape[3]
    )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    log_decay = log_decay.detach().contiguous()
    states = initial_state is not None or output_final_state
    plan = ParallelPlan(group, layout, exchange, tokens, scale, output_final_state, states, computing)
    with backends.device_of(q):  # Triton launches on the current device
        factors = decay_factors(plan, needed_pairs, log_decay, cu_seqlens)
        chunks = chunks_of(plan, log_decay, cu_seqlens)
    return _ContextParallel.apply(plan, chunks, factors, q, k, v, initial_state)


def _check_bounds(T: int, multiple: int, cu_seqlens: torch.Tensor) -> None:
    checks.check_cu_seqlens(cu_seqlens, T)
    if multiple > 1:
        check_divisible(cu_seqlens, multiple)


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan: ParallelPlan, chunks: Rows | DocumentStates, factors: Factors, q, k, v, initial_state):
        own, start = (initial_state, None) if chunks.by_document else (None, initial_state)
        with backends.device_of(q):
            if kept := recompute.take(plan):
                (incoming, end), split_states = kept, None
            else:
                destination = destination_for(plan, factors, q, v)
                local, split_states = chunks.local_states(k, v, chunks.initial_states(None, own), destination)
                need_end = plan.need_final and not chunks.by_document
                with marked("lightning_megatron.exchange.forward"):
                    incoming, end = exchange(plan, local, destination, factors, start, need_end)()
                recompute.put(plan, (incoming, end))
            o, final, saved, ctx.cut = plan.backend.forward(
                q, k, v, chunks.log_decay, plan.scale, chunks.initial_states(incoming, own), chunks.documents,
                plan.need_final and chunks.by_document, split_states, chunks.pieces,
            )  # fmt: skip
        ctx.plan, ctx.chunks, ctx.factors = plan, chunks, factors
        # log_decay, though chunks have it: autograd then refuses a backward with other decays than the forward's
        ctx.save_for_backward(q, k, v, initial_state, incoming, chunks.log_decay, *saved)
        ctx.set_materialize_grads(False)
        if plan.need_final and isinstance(chunks, DocumentStates):
            assert final is not None
            end = _sum(chunks.documents_ending(final, initial_state), plan.group)
        return o, end if plan.need_final else None

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal):
        plan, chunks, factors = ctx.plan, ctx.chunks, ctx.factors
        q, k, v, initial_state, incoming, _, *saved = ctx.saved_tensors
        if do is None:  # only the final state was used, and on all ranks
            do = q.new_zeros(*q.shape[:3], v.shape[3])
        do = do if do.stride(-1) == 1 else do.contiguous()
        (own, own_grad), start = ((initial_state, dfinal), None) if chunks.by_document else ((None, None), dfinal)
        destination = destination_for(plan, factors, q, v, reverse=True)
        local, split_grads = chunks.local_states(
            q, do, chunks.final_grads(None, own_grad), destination, reverse=True, scale=plan.scale
        )
        need_end = initial_state is not None and not chunks.by_document
        with marked("lightning_megatron.exchange.backward"):
            finish = exchange(plan, local, destination, factors, start, need_end, reverse=True)
        dinitial = None

        def arrived() -> torch.Tensor:
            nonlocal dinitial
            with marked("lightning_megatron.exchange.arrived"):
                grads, dinitial = finish()
            return chunks.final_grads(grads, own_grad)

        # Given the function, dq has a launch of its own, which hides a message from another node. One from this node is
        # there sooner than that launch takes longer (H100, NVLink: 7 us with 8 heads, 18 with 32;
        # tests/benchmarks/NOTES.md).
        dq, dk, dv, dpieces = plan.backend.backward(
            q, k, v, chunks.log_decay, plan.scale, chunks.initial_states(incoming, own), chunks.documents, tuple(saved),
            ctx.cut, do, arrived() if destination else arrived, split_grads, chunks.pieces,
        )  # fmt: skip
        if initial_state is not None and chunks.by_document:
            dinitial = _sum(chunks.documents_beginning(dpieces, dfinal), plan.group)
        return None, None, None, dq, dk, dv, dinitial if initial_state is not None else None


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    dist.all_reduce(x, group=group)
    return x
