"""Lightning attention over a context-parallel group: every rank holds some chunks of the sequence, and only states
travel.

With chunks c = 0..N-1 of the whole sequence, chunk c of n_c tokens, and the formulas of ops/triton/kernels.py,

    M_c = sum_i lambda^(n_c-1-i) k_i^T v_i               what chunk c adds to the state
    S_c = lambda^(n_(c-1)) S_(c-1) + M_(c-1)             the state that enters chunk c; S_0 is the initial state
    G_c = scale sum_i lambda^(i+1) q_i^T do_i            what chunk c adds to the gradient of the state, in reversed
    time
    D_c = lambda^(n_(c+1)) D_(c+1) + G_(c+1)             the gradient that enters chunk c; D_(N-1) is that of the final
    state

Every rank computes the M (backward: G) of its chunks, an exchange turns them into S (D), and the operator runs on the
chunks with S as initial states (D as gradients of final states). Tokens never move, so that what is sent does not
depend on their number: LASP-2 (Sun et al. 2025, arXiv:2502.07563) gathers the states, LASP (Sun et al. 2024,
arXiv:2404.02882) passes them on from rank to rank, ZeCO (Chou et al. 2025, arXiv:2507.01004) does so in blocks that
follow each other. States are fp32.
"""

from .attention import lightning_attn
from .exchange import EXCHANGES
from .layout import LAYOUTS, token_positions
from .ranges import mark_by
from .recompute import exchange_once

__all__ = ["EXCHANGES", "LAYOUTS", "exchange_once", "lightning_attn", "mark_by", "token_positions"]
