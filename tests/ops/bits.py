"""Fingerprints of the operator's results, to show that a change keeps their bits:

    python tests/ops/bits.py > new                                     (with this checkout's package)
    PYTHONPATH=/path/to/another/checkout python tests/ops/bits.py > old
    diff old new

It uses the public operator only, so that it runs with any version of the package. It prints a line per case and
quantity: the first 16 digits of the SHA-256 of the bytes. On a GPU in bf16, fp16 and fp32; without one in fp32 by
Triton's interpreter.
"""

from __future__ import annotations

import hashlib
import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
DEVICE = "cuda" if GPU else "cpu"

# B, T, H, Hkv, K, V, bounds of documents, states
SHAPES = [
    (1, 100, 2, 2, 32, 16, None, True),
    (2, 70, 4, 2, 16, 48, None, False),
    (1, 150, 2, 1, 32, 32, [0, 3, 3, 40, 41, 150], True),
]
LARGE = [
    (1, 8192, 32, 32, 128, 128, None, False),
    (8, 2048, 32, 32, 128, 128, None, True),
    (1, 32768, 8, 8, 128, 128, None, True),
    (1, 5000, 16, 4, 128, 128, None, True),
    (1, 4097, 8, 8, 64, 96, None, True),
    (1, 3000, 4, 4, 256, 192, None, True),
    (1, 16384, 8, 8, 128, 128, [0, 1, 700, 4096, 4096, 9000, 16384], True),
    (1, 16384, 8, 2, 128, 128, list(range(0, 16385, 512)), False),
    (16, 1, 32, 32, 128, 128, None, True),
]


def fingerprint(x: torch.Tensor) -> str:
    return hashlib.sha256(x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def evaluate(shape: tuple, dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    from lightning_megatron.ops import lightning_attn

    B, T, H, Hkv, K, V, bounds, states = shape
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=rng).to(DEVICE)
    q, k, v = (draw(B, T, h, d).to(dtype).requires_grad_() for h, d in ((H, K), (Hkv, K), (Hkv, V)))
    do = draw(B, T, H, V).to(dtype)
    documents = None if bounds is None else torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    N = B if bounds is None else len(bounds) - 1
    state = draw(N, H, K, V).requires_grad_() if states else None
    dfinal = draw(N, H, K, V)
    log_decay = -(2.0 ** (-8 * torch.arange(1, H + 1) / H)).to(DEVICE)
    o, final = lightning_attn(
        q, k, v, log_decay, initial_state=state, output_final_state=states, cu_seqlens=documents, backend="triton"
    )
    inputs = [q, k, v] + ([state] if states else [])
    outputs, grads = ([o, final], [do, dfinal]) if states else ([o], [do])
    found = torch.autograd.grad(outputs, inputs, grads)
    names = ["dq", "dk", "dv", "dinitial"]
    return {"o": o} | ({"final": final} if states else {}) | dict(zip(names, found, strict=False))


def main() -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32) if GPU else (torch.float32,)
    for seed, shape in enumerate(SHAPES + (LARGE if GPU else [])):
        for dtype in dtypes:
            where = f"{str(dtype).removeprefix('torch.')} {shape[:6]} {'packed' if shape[6] else ''}"
            for name, x in evaluate(shape, dtype, seed).items():
                print(where, name, fingerprint(x), flush=True)


if __name__ == "__main__":
    main()
