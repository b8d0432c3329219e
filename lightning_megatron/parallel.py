"""Lightning attention over a context-parallel group: every rank holds some chunks of the sequence, and only states travel.

With chunks c = 0..N-1 of the whole sequence, chunk c of n_c tokens, and the formulas of ops/kernels.py,

    M_c = sum_i lambda^(n_c-1-i) k_i^T v_i               what chunk c adds to the state
    S_c = lambda^(n_(c-1)) S_(c-1) + M_(c-1)             the state that enters chunk c; S_0 is the initial state
    G_c = scale sum_i lambda^(i+1) q_i^T do_i            what chunk c adds to the gradient of the state, in reversed time
    D_c = lambda^(n_(c+1)) D_(c+1) + G_(c+1)             the gradient that enters chunk c; D_(N-1) is that of the final state

Every rank computes the M (backward: G) of its chunks, an exchange turns them into S (D), and the operator runs on the chunks
with S as initial states (D as gradients of final states). Tokens never move, so that what is sent does not depend on their
number: LASP-2 (Sun et al. 2025, arXiv:2502.07563) gathers the states, LASP (Sun et al. 2024, arXiv:2404.02882) passes them on
from rank to rank, ZeCO (Chou et al. 2025, arXiv:2507.01004) does so in blocks that follow each other. States are fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary

from .ops import api

LAYOUTS = ("contiguous", "zigzag", "zigzag-documents")
EXCHANGES = ("auto", "all-gather", "ring", "pipelined")
GATHERED_RANKS = 16  # with more, all-gather sends more than it saves in latency
BLOCKS = 4  # of the pipelined exchange, along K


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
        exchange: ``"all-gather"``, ``"ring"``, ``"pipelined"``, or ``"auto"``: all-gather up to 16 ranks, pipelined beyond.
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
        raise ValueError("layout='zigzag-documents' needs cu_seqlens, the bounds of the documents; or use layout='zigzag'")
    if group is None or group.size() == 1:
        return api.lightning_attn(q, k, v, log_decay, output_final_state=output_final_state, backend=backend, **options)
    api.check_shapes(q, k, v, log_decay, **options)
    tokens = _tokens_of_ranks(q.shape[1], group, layout, tokens)
    documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
    _agree(
        group, q.device, tokens=q.shape[1] if len(set(tokens)) == 1 else tuple(tokens), B=q.shape[0], H=q.shape[2], Hkv=k.shape[2],
        K=k.shape[3], V=v.shape[3], dtype=q.dtype, layout=layout, exchange=exchange, documents=documents,
        initial_state=initial_state is not None, output_final_state=output_final_state,
    )  # fmt: skip
    api.check_values(log_decay, cu_seqlens, sum(tokens))
    if layout == "zigzag-documents":
        api.check_once(cu_seqlens, _check_documents, 2 * group.size())
    if exchange == "auto":
        exchange = "all-gather" if group.size() <= GATHERED_RANKS else "pipelined"
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    plan = _Plan(group, layout, exchange, tokens, scale, output_final_state, api.choose_implementation(backend, q))
    local = _local(plan, log_decay, cu_seqlens)
    return _ContextParallel.apply(plan, local, q, k, v, initial_state)


def token_places(
    tokens: int, *, group: dist.ProcessGroup, layout: str = "zigzag", cu_seqlens: torch.Tensor | None = None, device=None
) -> torch.Tensor:
    """Where in the whole sequence this rank's ``tokens`` tokens are, ``[tokens]`` int64, by ``layout`` as of ``lightning_attn``.

    contiguous: all ranks have as many tokens.
    """
    P, r = group.size(), group.rank()
    device = device if cu_seqlens is None else cu_seqlens.device
    i = torch.arange(tokens, device=device)
    if layout == "contiguous":
        return i + r * tokens
    if layout == "zigzag":
        half = tokens // 2
        return torch.where(i < half, i + r * half, i - half + (2 * P - 1 - r) * half)
    starts = cu_seqlens.long() // P  # of the documents on this rank
    document = torch.searchsorted(starts, i, right=True) - 1
    half = (starts.diff() // 2)[document]
    offset = i - starts[document]
    offset = torch.where(offset < half, offset + r * half, offset - half + (2 * P - 1 - r) * half)
    return cu_seqlens.long()[document] + offset


def packed_angles(
    freqs: torch.Tensor, tokens: int, *, group: dist.ProcessGroup, layout: str, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Rotary angles of this rank's tokens ``[tokens, 1, 1, dim]``, by their places in their documents.

    ``freqs [length, 1, 1, dim]`` are those of the places in a document, or, where there are as many as tokens on all ranks, of
    the places in the whole sequence: what Megatron's GPTModel passes to its layers.
    """
    places = token_places(tokens, group=group, layout=layout, cu_seqlens=cu_seqlens)
    if freqs.shape[0] != tokens * group.size():
        bounds = cu_seqlens.long()
        places = places - bounds[torch.searchsorted(bounds, places, right=True) - 1]
    return freqs[places]


def _tokens_of_ranks(mine: int, group: dist.ProcessGroup, layout: str, tokens: Sequence[int] | None) -> tuple[int, ...]:
    if tokens is None:
        tokens = [mine] * group.size()
    if len(tokens) != group.size() or tokens[group.rank()] != mine or min(tokens) < 0:
        raise ValueError(
            f"tokens={list(tokens)} must say how many tokens each of the {group.size()} ranks has, and rank {group.rank()} has {mine}"
        )
    if layout != "contiguous" and len(set(tokens)) > 1:
        raise ValueError(f"layout={layout!r} gives all ranks as many tokens, but tokens={list(tokens)}; leave tokens out")
    if layout != "contiguous" and mine % 2:
        raise ValueError(f"layout={layout!r} gives every rank two chunks of equal length, but this one has {mine} tokens")
    return tuple(tokens)


_agreed: set[tuple] = set()
WORDS = 64  # of a name or number in the header


def _agree(group: dist.ProcessGroup, device: torch.device, **arguments) -> None:
    """Raise on every rank if arguments differ, asked whenever this rank's change: they change on all ranks together.

    Should they change on one rank alone, it waits here and the others in the exchange, until the group's timeout.
    """
    key = (group.group_name, device, *arguments.values())
    if key in _agreed:
        return
    mine = "".join(f"{value!s:{WORDS}.{WORDS}}" for value in arguments.values()).encode("ascii", "replace")
    header = torch.tensor(list(mine), dtype=torch.uint8, device=device)
    headers = [torch.empty_like(header) for _ in range(group.size())]
    dist.all_gather(headers, header, group=group)
    ranks = [bytes(x.tolist()).decode() for x in headers]
    wrong = []
    for i, name in enumerate(arguments):
        values = [text[i * WORDS : (i + 1) * WORDS].strip() for text in ranks]
        if len(set(values)) > 1:
            wrong.append(f"{name} {', '.join(values)}")
    if wrong:
        raise ValueError(f"ranks of the context-parallel group were called with different arguments: {'; '.join(wrong)}")
    _agreed.add(key)


def _check_documents(cu_seqlens: torch.Tensor, chunks: int) -> None:
    for n, length in enumerate(cu_seqlens.diff().tolist()):
        if length % chunks:
            raise ValueError(
                f"layout='zigzag-documents' cuts every document into {chunks} equal chunks, but document {n} has {length} tokens; "
                f"pad documents to a multiple of {chunks}"
            )


@dataclass(frozen=True)
class _Plan:
    """What the ranks have agreed on."""

    group: dist.ProcessGroup
    layout: str
    exchange: str
    tokens: tuple[int, ...]  # of each rank
    scale: float
    need_final: bool
    implementation: object

    @property
    def chunks(self) -> list[tuple[int, ...]]:
        """Of each rank, its chunks in the order of its tokens."""
        P = self.group.size()
        return [(r,) if self.layout == "contiguous" else (r, 2 * P - 1 - r) for r in range(P)]

    @property
    def mine(self) -> tuple[int, ...]:
        return self.chunks[self.group.rank()]

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where chunks begin and end in the whole sequence; not for documents that are cut one by one."""
        lengths = self.tokens if self.layout == "contiguous" else [self.tokens[0] // 2] * (2 * len(self.tokens))
        bounds = [0]
        for n in lengths:
            bounds.append(bounds[-1] + n)
        return tuple(bounds)


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, local, q, k, v, initial_state):
        whole, start = (initial_state, None) if local.packed else (None, initial_state)
        with torch.cuda.device_of(q):
            args = *(local.split(x) for x in (q, k, v)), local.log_decay, plan.scale
            own, parts = local.own_states(plan.implementation, *args[1:3], local.begin(None, whole))
            entering, end = _exchange(plan, own, local.chain, start, plan.need_final and not local.packed)()
            o, final, saved, ctx.cut = plan.implementation.forward(
                *args, local.begin(entering, whole), local.cu_seqlens, plan.need_final and local.packed, parts
            )
        ctx.plan, ctx.local = plan, local
        ctx.save_for_backward(q, k, v, initial_state, entering, *saved)
        ctx.set_materialize_grads(False)
        if plan.need_final and local.packed:
            end = _sum(local.documents_ending(final, initial_state), plan.group)
        return o.reshape(*q.shape[:3], v.shape[3]), end if plan.need_final else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dfinal):
        plan, local = ctx.plan, ctx.local
        q, k, v, initial_state, entering, *saved = ctx.saved_tensors
        if do is None:  # only the final state was used, and on all ranks
            do = q.new_zeros(*q.shape[:3], v.shape[3])
        do = local.split(do if do.stride(-1) == 1 else do.contiguous())
        args = *(local.split(x) for x in (q, k, v)), local.log_decay, plan.scale
        (whole, start), (whole_grad, start_grad) = (
            (x, None) if local.packed else (None, x) for x in (initial_state, dfinal)
        )
        own, parts = local.own_states(
            plan.implementation, args[0], do, local.end(None, whole_grad), reverse=True, scale=plan.scale
        )
        finish = _exchange(
            plan, own, local.chain, start_grad, initial_state is not None and not local.packed, reverse=True
        )
        dinitial = None

        def arrived() -> torch.Tensor:
            nonlocal dinitial
            leaving, dinitial = finish()
            return local.end(leaving, whole_grad)

        dq, dk, dv, dbegin = plan.implementation.backward(
            *args, local.begin(entering, whole), local.cu_seqlens, saved, ctx.cut, do, arrived, parts
        )
        if initial_state is not None and local.packed:
            dinitial = _sum(local.documents_beginning(dbegin, dfinal), plan.group)
        dq, dk, dv = (dx.reshape(x.shape) for dx, x in zip((dq, dk, dv), (q, k, v), strict=True))
        return None, None, dq, dk, dv, dinitial if initial_state is not None else None


def _sum(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    dist.all_reduce(x, group=group)
    return x


# ---- the chunks of a rank --------------------------------------------------------------------------------------------


class _Chain:
    """How much of a state is left from one bound of the chunks to another: nothing where a document begins on the way.

    R independent chains run over the same chunks: the rows of a batch, or documents that are cut one by one.
    """

    def __init__(self, log_decay: torch.Tensor, bounds: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> None:
        """``bounds [N+1, R or 1]`` of the N chunks, in tokens."""
        self.log_decay, self.bounds, self.cu_seqlens = log_decay, bounds, cu_seqlens
        self._kept: dict[tuple, torch.Tensor] = {}  # forward and backward ask for the same

    def factors(self, pairs: tuple[tuple[int, int], ...]) -> torch.Tensor:
        """``[pairs, R or 1, H]`` from one bound to another that is not before it."""
        if pairs not in self._kept:
            self._kept[pairs] = self._factors(pairs)
        return self._kept[pairs]

    def weights(self, places: tuple[int, ...], chunks: tuple[int, ...], reverse: bool) -> torch.Tensor:
        """``[places, chunks, R or 1, H]``: what is left at bounds ``places`` of what chunks add; 0 of those that come later."""
        key = places, chunks, reverse
        if key not in self._kept:
            self._kept[key] = self._weights(*key)
        return self._kept[key]

    def _factors(self, pairs):
        a, b = (torch.stack([self.bounds[pair[side]] for pair in pairs]) for side in (0, 1))
        factors = torch.exp((b - a)[..., None] * self.log_decay)  # the difference in integers: fp32 ends at 2^24 tokens
        if self.cu_seqlens is not None:
            begins = (self.cu_seqlens >= a[..., None]) & (self.cu_seqlens <= b[..., None])
            factors = factors * ~begins.any(-1, keepdim=True)
        return factors

    def _weights(self, places, chunks, reverse):
        pairs = {(p, c): (p, c) if reverse else (c + 1, p) for p in places for c in chunks if (c >= p if reverse else c < p)}
        none = torch.zeros_like(self.bounds[0, :, None] * self.log_decay)
        found = dict(zip(pairs, self.factors(tuple(pairs.values())), strict=True)) if pairs else {}
        return torch.stack([torch.stack([found.get((p, c), none) for c in chunks]) for p in places])


class _Rows:
    """Chunks of rows of a batch, or of documents that are cut one by one: R rows of ``count`` pieces on this rank."""

    packed = False

    def __init__(self, plan: _Plan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
        self.log_decay, self.count, P = log_decay, len(plan.mine), plan.group.size()
        bounds = _constant(plan.bounds, log_decay.device)[:, None]
        self.cu_seqlens = None
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff() // (2 * P)  # of a chunk of each document
            bounds = torch.arange(2 * P + 1, device=log_decay.device)[:, None] * lengths
            ends = lengths.repeat_interleave(2).cumsum(0)
            self.cu_seqlens = torch.cat((ends.new_zeros(1), ends))
        self.chain = _Chain(log_decay, bounds)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's tokens ``[B, T, ...]`` as the operator takes them."""
        return x if self.count == 1 or self.cu_seqlens is not None else x.unflatten(1, (self.count, -1)).flatten(0, 1)

    def begin(self, states: torch.Tensor | None, whole: torch.Tensor | None) -> torch.Tensor | None:
        """States ``[chunks, R, ...]`` that enter the chunks from the left, as initial states of the pieces."""
        return None if states is None else states.transpose(0, 1).flatten(0, 1)

    end = begin

    def own_states(self, implementation, k, v, initial, **how) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the chunks add ``[chunks, R, ...]``, and what the operator need not compute again."""
        parts = None
        if self.cu_seqlens is None:
            states, parts = implementation.end_states(k, v, self.log_decay, initial, None, **how)
        else:
            states = implementation.final_states(k, v, self.log_decay, initial, self.cu_seqlens, **how)
        return states.unflatten(0, (-1, self.count)).transpose(0, 1), parts


class _Packed:
    """Chunks of a packed sequence: a piece is what a document has in a chunk, chunk by chunk all documents, most of them empty.

    Only the document of a chunk's first token may have begun before, and only that of its last token goes on behind it.
    """

    packed = True

    def __init__(self, plan: _Plan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor) -> None:
        self.log_decay, device = log_decay, log_decay.device
        bounds, chunks = _constant(plan.bounds, device), _constant(plan.mine, device)
        cu_seqlens = cu_seqlens.long()
        a, b = bounds[chunks, None], bounds[chunks + 1, None]
        inside = torch.minimum(torch.maximum(cu_seqlens, a), b) - a  # [chunks, N + 1]
        before = (b - a).cumsum(0) - (b - a)
        self.cu_seqlens = torch.cat(((inside + before)[:, :-1].flatten(), (b - a).sum(0)))
        self.documents = cu_seqlens.numel() - 1
        self.inside, self.lengths = inside, [plan.bounds[c + 1] - plan.bounds[c] for c in plan.mine]
        offset = torch.arange(len(plan.mine), device=device) * self.documents
        self.firsts = torch.searchsorted(cu_seqlens, a[:, 0], right=True) - 1 + offset
        self.lasts = torch.searchsorted(cu_seqlens, b[:, 0] - 1, right=True) - 1 + offset
        filled = inside[:, 1:] > inside[:, :-1]
        self.begins = (filled & (cu_seqlens[:-1] >= a))[..., None, None, None]
        self.ends = (filled & (cu_seqlens[1:] <= b))[..., None, None, None]
        self.empty = (cu_seqlens.diff() == 0)[:, None, None, None] & (plan.group.rank() == 0)  # rank 0 answers for them
        self.chain = _Chain(log_decay, bounds[:, None], cu_seqlens)

    def split(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def begin(self, states: torch.Tensor | None, whole: torch.Tensor | None) -> torch.Tensor | None:
        """What enters the chunks ``[chunks, 1, ...]``, and ``whole [N, ...]`` where documents begin, as states of pieces."""
        return self._place(states, whole, self.firsts, self.begins)

    def end(self, states: torch.Tensor | None, whole: torch.Tensor | None) -> torch.Tensor | None:
        return self._place(states, whole, self.lasts, self.ends)

    def _place(self, states, whole, pieces, places):
        if states is None and whole is None:
            return None
        found = None if whole is None else torch.where(places, whole, 0.0).flatten(0, 1)
        if states is None:
            return found
        if found is None:
            found = states.new_zeros(self.begins.shape[0] * self.documents, *states.shape[2:])
        return found.index_add(0, pieces, states[:, 0])

    def own_states(self, implementation, k, v, initial, **how) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the chunks add to the state of their last document, reversed of their first ``[chunks, 1, ...]``."""
        initial = [None] * len(self.lengths) if initial is None else initial.unflatten(0, (len(self.lengths), -1))
        chunks = zip(*(x.split(self.lengths, dim=1) for x in (k, v)), initial, self.inside, strict=True)
        own = [implementation.end_states(k, v, self.log_decay, s, bounds, **how)[0] for k, v, s, bounds in chunks]
        return torch.stack(own), None  # parts of a chunk are not those of all tokens

    def documents_beginning(self, states: torch.Tensor, of_empty: torch.Tensor | None) -> torch.Tensor:
        """States of pieces for the documents ``[N, ...]`` that begin on this rank, 0 for the others."""
        return self._documents(states, of_empty, self.begins)

    def documents_ending(self, states: torch.Tensor, of_empty: torch.Tensor | None) -> torch.Tensor:
        return self._documents(states, of_empty, self.ends)

    def _documents(self, states, of_empty, places):
        found = torch.where(places, states.unflatten(0, (-1, self.documents)), 0.0).sum(0)
        return found if of_empty is None else torch.where(self.empty, of_empty, found)


def _local(plan: _Plan, log_decay: torch.Tensor, cu_seqlens: torch.Tensor | None) -> _Rows | _Packed:
    """Without documents the same in every call with this log_decay: kept for it, since factors cost many small launches."""
    constant = log_decay.detach().contiguous()
    if cu_seqlens is not None:
        return (_Rows if plan.layout == "zigzag-documents" else _Packed)(plan, constant, cu_seqlens)
    version = plan, None if log_decay.is_inference() else log_decay._version
    if log_decay not in _kept or _kept[log_decay][0] != version:
        _kept[log_decay] = version, _Rows(plan, constant, None)
    return _kept[log_decay][1]


_kept = WeakTensorKeyDictionary()


@functools.lru_cache(maxsize=64)
def _constant(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """On the device, where a copy would wait for all that is launched."""
    return torch.tensor(values, device=device)


# ---- exchanges -------------------------------------------------------------------------------------------------------


def _exchange(
    plan: _Plan, own: torch.Tensor, chain: _Chain, start: torch.Tensor | None, need_end: bool, reverse: bool = False
) -> Callable[[], tuple[torch.Tensor, torch.Tensor | None]]:
    """Begin to turn what chunks add to the state into the state that enters them.

    Args:
        own: ``[chunks of this rank, R, H, K, V]``.
        start: ``[R, H, K, V]``, what enters the first chunk; None for zeros.
        need_end: whether to return what leaves the last chunk, on all ranks.
        reverse: states go from the last chunk to the first.

    Returns:
        A function that waits and returns what enters this rank's chunks, shaped as own, and what leaves the last chunk
        ``[R, H, K, V]``. On a GPU the exchange goes on beside what is launched before it is called.
    """
    own = own.contiguous()
    if plan.exchange == "all-gather":
        return _gather(plan, own, chain, start, need_end, reverse)
    if not own.is_cuda:
        return functools.partial(_pass_on, plan, own, chain, start, need_end, reverse)
    stream, here = _stream(own.device), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        found = _pass_on(plan, own, chain, start, need_end, reverse)
    for x in (own, start):
        if x is not None:
            x.record_stream(stream)

    def finish():
        torch.cuda.current_stream().wait_stream(stream)
        for x in found:
            if x is not None:
                x.record_stream(torch.cuda.current_stream())
        return found

    return finish


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where states are passed on from rank to rank, beside the operator."""
    return torch.cuda.Stream(device, priority=-1)


def _gather(plan, own, chain, start, need_end, reverse):
    """All ranks get the M of all chunks, and each adds up what it needs (LASP-2)."""
    gathered = own.new_empty(plan.group.size() * own.shape[0], *own.shape[1:])
    work = dist.all_gather_into_tensor(gathered, own, group=plan.group, async_op=True)  # on a stream of its own on a GPU
    N = len(plan.bounds) - 1
    places = tuple(c + 1 if reverse else c for c in plan.mine) + ((0 if reverse else N,) if need_end else ())
    weights = chain.weights(places, tuple(c for chunks in plan.chunks for c in chunks), reverse)
    first = chain.factors(tuple((p, N) if reverse else (0, p) for p in places)) if start is not None else None

    def finish():
        work.wait()
        states = plan.implementation.combine(gathered, weights)
        if start is not None:
            states += first[..., None, None] * start
        return states[: len(plan.mine)], states[-1] if need_end else None

    return finish


def _pass_on(plan, own, chain, start, need_end, reverse):
    """The state goes from chunk to chunk (LASP), in blocks along K that follow each other (ZeCO) if the exchange is pipelined."""
    group, rank = plan.group, plan.group.rank()
    N = len(plan.bounds) - 1
    owner = {c: r for r, chunks in enumerate(plan.chunks) for c in chunks}
    order = range(N - 1, -1, -1) if reverse else range(N)
    blocks = BLOCKS if plan.exchange == "pipelined" else 1
    entering, sent, leaves = torch.empty_like(own), [], []
    state_blocks = [None] * blocks
    parts = [list(x.chunk(blocks, dim=2)) for x in own]
    zeros = torch.zeros_like(own[0]) if start is None else start
    for step, c in enumerate(order):
        if owner[c] != rank:
            continue
        i = plan.mine.index(c)
        a, b = c, c + 1
        edge = a if reverse else b
        through, on = chain.factors(((a, b), (edge, edge)))[..., None, None]  # the second 0 where a document begins there
        before = owner[order[step - 1]] if step else None
        after = owner[order[step + 1]] if step + 1 < N else None
        for j, part in enumerate(parts[i]):
            if before is None:
                state = zeros.chunk(blocks, dim=2)[j]
            elif before == rank:
                state = state_blocks[j]
            else:
                state = torch.empty_like(part)
                dist.recv(state, group=group, group_src=before)
            entering[i].chunk(blocks, dim=2)[j].copy_(state)
            state = (on * part + through * state).contiguous()
            state_blocks[j] = state
            if after is not None and after != rank:
                sent.append((dist.isend(state, group=group, group_dst=after), state))
        if after is None:
            leaves = list(state_blocks)
    for work, _ in sent:
        work.wait()
    if not need_end:
        return entering, None
    end = torch.cat(leaves, dim=2) if leaves else torch.empty_like(own[0])
    dist.broadcast(end, group=group, group_src=owner[order[-1]])
    return entering, end
