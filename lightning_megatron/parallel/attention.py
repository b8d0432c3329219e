"""The operator over ranks: validation, what the ranks agree on, autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from .. import ops
from ..ops import backend as backends
from ..ops import checks, memo
from . import chunks, recompute
from .consistency import agree, check_documents, tokens_of_ranks
from .exchange import EXCHANGES, choose, exchange, mail_for
from .layout import LAYOUTS


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
        layout: where the tokens are. ``"contiguous"``: rank r holds chunk r of P.
            ``"zigzag"``: the sequence is cut into 2P equal chunks, and rank r holds chunk r and then chunk 2P-1-r, which is
            how Megatron balances causal softmax attention. ``"zigzag-documents"``: every document by itself is cut so (its
            length is a multiple of 2P), as by TransformerEngine's ``thd_get_partitioned_indices``.
        tokens: of every rank, where contiguous chunks differ in length; the same on all ranks.
        exchange: ``"direct"`` (GPUs of one node write into each other's memory), ``"all-gather"``, ``"ring"``, ``"pipelined"``,
            ``"scan"`` (prefix sums by doubling), or ``"auto"``: direct where it is possible, else all-gather up to 16 ranks, scan
            beyond.
        initial_state: as of the operator, of the whole sequence (or of whole documents) and the same on all ranks.
        output_final_state: also return the final state of the whole sequence (of every whole document), on all ranks. Its
            gradient must then be the same on all ranks, and that of initial_state is.
        cu_seqlens: bounds of the documents in the whole sequence, the same on all ranks; may cross chunks anywhere.

    Returns:
        ``(o, final_state)``: o of this rank's tokens.

    Raises:
        ValueError: what the operator raises, an unknown layout or exchange, tokens that cannot be this layout, or, on every
            rank, ranks whose arguments differ where they must not.
    """
    for name, value, known in (("layout", layout, LAYOUTS), ("exchange", exchange, EXCHANGES)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    options = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
    if layout == "zigzag-documents" and cu_seqlens is None:
        raise ValueError(
            "layout='zigzag-documents' needs cu_seqlens, the bounds of the documents; or use layout='zigzag'"
        )
    if group is None or group.size() == 1:
        return ops.lightning_attn(q, k, v, log_decay, output_final_state=output_final_state, backend=backend, **options)
    checks.check_shapes(q, k, v, log_decay, **options)
    tokens = tokens_of_ranks(q.shape[1], group, layout, tokens)
    documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    agree(
        group, q.device, tokens=q.shape[1] if len(set(tokens)) == 1 else tuple(tokens), B=q.shape[0], H=q.shape[2], Hkv=k.shape[2],
        K=k.shape[3], V=v.shape[3], dtype=q.dtype, layout=layout, exchange=exchange, documents=documents,
        initial_state=initial_state is not None, output_final_state=output_final_state,
    )  # fmt: skip
    checks.check_values(log_decay, cu_seqlens, sum(tokens))
    if layout == "zigzag-documents":
        memo.check_once(cu_seqlens, check_documents, 2 * group.size())
    implementation = backends.choose(backend, q)
    exchange = choose(exchange, layout, group, q.device, implementation)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    states = initial_state is not None or output_final_state
    plan = chunks.Plan(group, layout, exchange, tokens, scale, output_final_state, states, implementation)
    local = chunks.local(plan, log_decay, cu_seqlens)
    return _ContextParallel.apply(plan, local, q, k, v, initial_state)


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, local, q, k, v, initial_state):
        whole, start = (initial_state, None) if local.by_document else (None, initial_state)
        with torch.cuda.device_of(q):
            args = q, k, v, local.log_decay, plan.scale
            if kept := recompute.take(plan):
                (_, entering, end), parts = kept, None
            else:
                mail = mail_for(plan, local.chain, q, v)
                own, parts = local.own_states(plan.implementation, k, v, local.begin(None, whole), mail)
                entering, end = exchange(
                    plan, own, mail, local.chain, start, plan.need_final and not local.by_document
                )()
                recompute.put(plan, entering, end)
            o, final, saved, ctx.cut = plan.implementation.forward(
                *args,
                local.begin(entering, whole),
                local.cu_seqlens,
                plan.need_final and local.by_document,
                parts,
                local.pieces,
            )
        ctx.plan, ctx.local = plan, local
        ctx.save_for_backward(q, k, v, initial_state, entering, *saved)
        ctx.set_materialize_grads(False)
        if plan.need_final and local.by_document:
            end = _sum(local.documents_ending(final, initial_state), plan.group)
        return o, end if plan.need_final else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        plan, local = ctx.plan, ctx.local
        q, k, v, initial_state, entering, *saved = ctx.saved_tensors
        if do is None:  # only the final state was used, and on all ranks
            do = q.new_zeros(*q.shape[:3], v.shape[3])
        do = do if do.stride(-1) == 1 else do.contiguous()
        args = q, k, v, local.log_decay, plan.scale
        (whole, start), (whole_grad, start_grad) = (
            (x, None) if local.by_document else (None, x) for x in (initial_state, dfinal)
        )
        mail = mail_for(plan, local.chain, q, v, reverse=True)
        own, parts = local.own_states(
            plan.implementation, q, do, local.end(None, whole_grad), mail, reverse=True, scale=plan.scale
        )
        finish = exchange(
            plan, own, mail, local.chain, start_grad, initial_state is not None and not local.by_document, reverse=True
        )
        dinitial = None

        def arrived() -> torch.Tensor:
            nonlocal dinitial
            leaving, dinitial = finish()
            return local.end(leaving, whole_grad)

        # Given the function, dq has a launch of its own, which hides a message from another node. One from this node is there
        # sooner than that launch takes longer (H100, NVLink: 7 us with 8 heads, 18 with 32; tests/benchmarks/NOTES.md).
        dq, dk, dv, dbegin = plan.implementation.backward(
            *args, local.begin(entering, whole), local.cu_seqlens, saved, ctx.cut, do, arrived() if mail else arrived,
            parts, local.pieces,
        )  # fmt: skip
        if initial_state is not None and local.by_document:
            dinitial = _sum(local.documents_beginning(dbegin, dfinal), plan.group)
        return None, None, dq, dk, dv, dinitial if initial_state is not None else None


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    dist.all_reduce(x, group=group)
    return x
