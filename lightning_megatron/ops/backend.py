"""The backend contract: what a module that computes must provide. And the choice between the two: triton or torch."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, cast

import torch

logger = logging.getLogger(__name__)

Saved = tuple[torch.Tensor | None, ...]


class Documents(NamedTuple):
    """Documents packed along T, found anew in every call and owned by it: nobody else can change them."""

    ids: (
        torch.Tensor | None
    )  # [rows, T] int32, document of each token; None from the torch backend, which needs bounds only
    bounds: torch.Tensor  # [rows, N+1] int32, from the first token of each row on
    # Rows are segments of a longer sequence: the first document may have begun before the row and the last may go on
    # behind it, and states are those of rows. Otherwise there is one row, and states are those of its N documents.
    by_row: bool


class Destination(NamedTuple):
    """Where local states are written as soon as they are computed: symmetric buffers of all ranks of a group."""

    buffers: torch.Tensor  # [ranks] int64, addresses in this GPU's address space, in the order of ranks
    rank: int
    limit: int  # ns after which a program that still waits ends in an error of the GPU
    shape: tuple[int, int, int, int, int]  # of the states that a rank sends to another: chunks, R, H, K, V
    # [R or 1, H], where a rank has two chunks and sends one state: what is left after the second of what the first adds
    between: torch.Tensor | None = None


class Backend(Protocol):
    """What operator and context parallelism ask of a module.

    Shapes: q ``[B, T, H, K]``, k ``[B, T, Hkv, K]``, v ``[B, T, Hkv, V]``, log_decay ``[H]``; states ``[N, H, K, V]``
    fp32 (torch: fp64 for fp64 inputs).

    With ``pieces`` a row of the batch holds so many sequences of equal length one after the other. N counts sequences,
    ``B * pieces``, or documents where ``documents.by_row`` is False.
    """

    NAME: str
    DIRECT: bool  # whether it is a DirectBackend

    def find_documents(
        self, cu_seqlens: torch.Tensor, T: int, total: int, starts: tuple[int, ...] | None = None, per_document: int = 0
    ) -> Documents:
        """Documents of ``cu_seqlens [N+1]`` (int32 or int64, from 0 to ``total``) in T tokens. Does not wait for a GPU.

        By default the tokens are the whole sequence. With ``starts`` they are rows of T tokens which begin there
        (``by_row``). With ``per_document`` every document has been cut into that many equal chunks, and the T tokens
        are, document after document, two of them as pieces of their own: 2 N documents.
        """
        ...

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor,
        scale: float,
        initial_state: torch.Tensor | None,
        documents: Documents | None,
        need_final: bool,
        split_states: torch.Tensor | None = None,
        pieces: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Saved, Any]:
        """``(o [B,T,H,V], final_state or None, tensors for the backward, plan for the backward)``.

        ``split_states`` is what ``local_states`` of (k, v) returned last, if it has been called with the same
        initial_state.
        """
        ...

    def backward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor,
        scale: float,
        initial_state: torch.Tensor | None,
        documents: Documents | None,
        saved: Saved,
        plan: Any,
        do: torch.Tensor,
        dfinal: torch.Tensor | Callable[[], torch.Tensor | None] | None,
        split_grads: torch.Tensor | None = None,
        pieces: int = 1,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """``(dq, dk, dv, dinitial or None)``; ``saved`` and ``plan`` are what ``forward`` returned last.

        ``split_grads`` is what ``local_states`` of (q, do) returned last, if it has been called. ``dfinal`` may be a
        function, which waits for it: what does not depend on it is then launched before the function is called.
        """
        ...

    def local_states(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor,
        initial_state: torch.Tensor | None,
        documents: Documents | None,
        reverse: bool = False,
        scale: float = 1.0,
        pieces: int = 1,
        destination: Destination | None = None,
        first: int = 0,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What every sequence adds to the state, ``[B * pieces, H, K, V]``; of packed sequences their last document.

        And the states of splits, None where ``forward`` (``backward``) needs none.

        With ``reverse``, of (q, do): what it adds to the gradient of the state, of packed sequences their first
        document. With ``destination`` (DirectBackend) they are sent, as sequences ``first``, first + 1, ... of the
        message, and not returned.
        """
        ...

    def final_states(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        log_decay: torch.Tensor,
        initial_state: torch.Tensor | None,
        documents: Documents | None,
        reverse: bool = False,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Final states ``[N, H, K, V]`` alone.

        With ``reverse``, of (q, do): the gradients of initial states, from those of final states in initial_state's
        place.
        """
        ...

    def outputs_like(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Without values, for torch.compile: o as of ``forward`` in one piece, the first of the tensors for the
        backward, and ids of packed documents; of 0 elements where there is none.
        """
        ...

    def gradients_like(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Without values, for torch.compile: dq, dk and dv as of ``backward``."""
        ...

    def plan_of(self, q: torch.Tensor, v: torch.Tensor) -> Any:
        """The plan that ``forward`` returns last, of q and v in one piece."""
        ...

    def combine(self, states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Sums ``[P, R, H, K, V]`` of ``states [N, R, H, K, V]`` with ``weights [P, N, R or 1, H]``.

        What has weight 0 does not count: a NaN there stays where it is.
        """
        ...

    def decay_factors(
        self,
        log_decay: torch.Tensor,
        pairs: torch.Tensor,
        *,
        length: int = 0,
        bounds: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        per_document: int = 0,
    ) -> torch.Tensor:
        """What is left of a state on the way from one bound of chunks to another, ``[n, R or 1, H]``.

        In log_decay's dtype, for ``pairs [n, 2]`` int32 (a, b): ``exp((bounds[b] - bounds[a]) log_decay)``, and 0 where
        a > b.

        Bound i is token ``i * length``, or ``bounds[i]`` of ``[chunks + 1]`` int64. With ``cu_seqlens [N+1]``, 0 also
        where a document begins on the way, edges included. With ``per_document`` each of R = N documents is a sequence
        of its own, cut into that many equal chunks. Without waiting for the GPU.
        """
        ...


class DirectBackend(Backend, Protocol):
    """A backend whose local states can be written straight into other GPUs' memory."""

    def buffer_words(self, ranks: int, shape: tuple[int, int, int, int, int]) -> int:
        """Size of a symmetric buffer for messages of this ``shape``, in words of 4 bytes, zero at first."""
        ...

    def receive(self, destination: Destination, weights: torch.Tensor) -> torch.Tensor:
        """``combine(states, weights)`` of the states ``[ranks * chunks, R, H, K, V]`` that this rank has been sent.

        Chunks in the order of ranks.
        """
        ...


@functools.cache
def triton_interpreted() -> bool:
    import triton

    knobs = getattr(triton, "knobs", None)  # since Triton 3.4
    return bool(knobs.runtime.interpret) if knobs else os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _auto_backend(device_type: str) -> str:
    if device_type != "cuda":
        return "torch"
    if importlib.util.find_spec("triton") is None:
        logger.warning(
            "triton is not installed: lightning_attn uses its slower torch backend on the GPU; pip install triton"
        )
        return "torch"
    return "triton"


def choose(backend: str | None, q: torch.Tensor) -> Backend:
    if backend in (None, "auto"):
        backend = _auto_backend(q.device.type)
    if backend == "torch":
        from . import torch_backend

        return torch_backend
    if backend != "triton":
        raise ValueError(f"backend={backend!r} is unknown; choose 'triton', 'torch', or None to choose by device")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("backend='triton' needs the triton package, which is not installed; use backend='torch'")
    if q.device.type != "cuda" and not triton_interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA tensors, but q is on {q.device}; use backend='torch' or leave backend out"
        )
    if q.dtype == torch.float64:
        raise ValueError("q is float64, which the triton backend does not compute; use backend='torch', or fp32 inputs")
    return _triton_backend()


def by_triton(backend: str) -> bool:
    """Whether models of this process compute with Triton: where it is asked for, and by themselves on a GPU."""
    return (_auto_backend("cuda" if torch.cuda.is_available() else "cpu") if backend == "auto" else backend) == "triton"


_NO_CHANGE = contextlib.nullcontext()


def device_of(x: torch.Tensor) -> AbstractContextManager:
    """Makes x's device the current one, on which Triton launches. ``torch.cuda.device_of`` takes a microsecond more."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device_of(x)
    return _NO_CHANGE


def _triton_backend() -> DirectBackend:
    from .triton import attention

    return attention


def direct(backend: Backend) -> DirectBackend:
    """``backend`` as what its ``DIRECT`` says it is."""
    assert backend.DIRECT
    return cast(DirectBackend, backend)
