"""Small models, the parallel layouts they train in, and the comparison of two training runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.launch import Run, run_pretrain
from tests.tolerances import TRAINED_LOSSES, TRAINED_NORMS

SIZE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --max-position-embeddings 128 "
    "--vocab-size 255 --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0"
).split()
# Adam's eps is large: with 1e-8 the sign of a gradient of almost 0, which rounding decides, would be a whole step.
TRAIN = (
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 5 --lr 2e-3 --adam-eps 1e-3 --lr-decay-style constant "
    "--log-interval 1 --eval-iters 0 --num-workers 0"
).split()
EVERYTHING = "--lightning-norm all --lightning-qk-norm --lightning-rope --lightning-num-kv-heads 2"
MODELS = {
    "all": "--normalization RMSNorm --swiglu --disable-bias-linear",
    "freq4": f"--linear-attention-freq 4 --normalization RMSNorm --swiglu --disable-bias-linear {EVERYTHING}",
    "freq2": "--linear-attention-freq 2 --qk-layernorm --group-query-attention --num-query-groups 2 "
    "--lightning-norm group --lightning-norm-groups 2 --lightning-decay minimax --lightning-feature-map silu-qkv "
    "--lightning-gate linear --lightning-value-head-dim 32",
    "moe": "--num-experts 4 --moe-layer-freq 2 --disable-bias-linear --linear-attention-freq 4 "
    f"--moe-ffn-hidden-size 64 --moe-router-load-balancing-type none {EVERYTHING}",
}
LATENT = (
    "--multi-latent-attention --rope-type rope --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 12 --qk-layernorm --lightning-rotary-percent 0.5"
)
# with Megatron's 0.02 the losses would hardly show another softmax
MODELS["latent"] = f"{MODELS['freq4']} {LATENT} --init-method-std 0.3"
MODELS["mtp"] = f"{MODELS['moe']} {LATENT} --mtp-num-layers 2 --untie-embeddings-and-output-weights"
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
LAYOUTS = {
    "one": (1, ""),
    "tp2": (2, "--tensor-model-parallel-size 2"),
    "tp2-sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "pp2-vp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "pp2-layout": (2, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|tL"),
    "dp2": (2, "--use-distributed-optimizer"),
    "tp2-dp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer"),
    "pp2-dp2": (4, "--pipeline-model-parallel-size 2 --use-distributed-optimizer"),
    "tp2-pp2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "cp2": (2, "--context-parallel-size 2"),
    "cp4-ring": (4, "--context-parallel-size 4 --lightning-cp-exchange ring"),
    "tp2-cp2-sp": (
        4,
        "--tensor-model-parallel-size 2 --sequence-parallel --context-parallel-size 2 "
        "--lightning-cp-exchange pipelined",
    ),
    "pp2-cp2": (4, "--pipeline-model-parallel-size 2 --context-parallel-size 2 --use-distributed-optimizer"),
    "cp2-recompute": (2, f"--context-parallel-size 2 {RECOMPUTE}"),
    "pp2-vp2-cp2-recompute": (
        4,
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --context-parallel-size 2 "
        f"{RECOMPUTE}",
    ),
    "recompute-full": (1, RECOMPUTE),
    "recompute-core": (1, "--recompute-granularity selective --recompute-modules core_attn"),
    "fused-loss": (1, "--cross-entropy-loss-fusion"),
    "tp2-fused-loss": (2, "--tensor-model-parallel-size 2 --cross-entropy-loss-fusion"),
    "tp2-sp-recompute": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 3",
    ),
}


def train(model: str, layout: str, flags: str = "", load: Path | None = None, fresh: bool = True, **arguments) -> Run:
    """Five iterations; ``fresh`` takes only the weights of the checkpoint."""
    nproc, layout_flags = LAYOUTS[layout]
    data = [] if "--data-path" in flags else ["--mock-data"]
    loading = ["--load", load] if load else []
    loading += ["--finetune", "--no-load-optim", "--no-load-rng"] if load and fresh else []
    return run_pretrain(
        [*SIZE, *TRAIN, *MODELS[model].split(), *data, *layout_flags.split(), *loading, *flags.split()],
        nproc,
        **arguments,
    )


def train_conversations(model: str, layout: str | tuple[int, str], data: list, flags: str = "") -> Run:
    """Five iterations on conversations, whose flags are ``data``; the layout by name, or (ranks, flags)."""
    nproc, layout_flags = LAYOUTS[layout] if isinstance(layout, str) else layout
    size = [*SIZE[: SIZE.index("--vocab-size")], *SIZE[SIZE.index("--vocab-size") + 2 :]]  # it is their tokenizer's
    return run_pretrain([*size, *TRAIN, *MODELS[model].split(), *layout_flags.split(), *flags.split(), *data], nproc)


def gradient_norms(run: Run) -> list[float]:
    return [float(norm) for norm in re.findall(r"grad norm: (\S+)", run.log)]


def assert_same_training(
    run: Run, want: Run, losses: float = TRAINED_LOSSES, norms: float = TRAINED_NORMS, skip: int = 0
) -> None:
    """The last losses and gradient norms of ``want``, after ``skip`` iterations, are those of ``run``."""
    assert len(want.losses) == 5
    assert run.losses == pytest.approx(want.losses[skip:], abs=losses)
    assert gradient_norms(run) == pytest.approx(gradient_norms(want)[skip:], abs=norms)
