"""``lightning_megatron.pretrain`` with the operator in fp64: what ``fidelity`` compares the kernels with.

    python -m examples.quality.exact FLAGS OF PRETRAIN

q, k and v of every lightning layer are taken to fp64, torch's backend computes o and the gradients there, and they are
rounded to the dtype that they came in. Everything else is as in other trainings: Megatron has no fp64.
"""

from __future__ import annotations

import torch

from lightning_megatron import pretrain


def exactly(attn):
    """``attn``, as of ``lightning_megatron.parallel.lightning_attn``, in fp64 by torch."""

    def lightning_attn(q, k, v, log_decay, *, initial_state=None, backend=None, **how):
        start = None if initial_state is None else initial_state.double()
        o, state = attn(
            q.double(), k.double(), v.double(), log_decay.double(), initial_state=start, backend="torch", **how
        )
        return o.to(q.dtype), None if state is None else state.to(torch.promote_types(q.dtype, torch.float32))

    return lightning_attn


def main() -> None:
    try:
        pretrain.check_megatron()
    except RuntimeError as error:
        raise SystemExit(f"exact: {error}") from error
    from lightning_megatron import mixer

    mixer.lightning_attn = exactly(mixer.lightning_attn)
    pretrain.main()


if __name__ == "__main__":
    main()
