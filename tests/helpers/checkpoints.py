"""Checkpoints after 2 of 4 iterations, and runs that go on from them, in both ways of starting.

`own` is lightning_megatron.pretrain, `gpt` is pretrain_gpt.py, with --spec or as plain Megatron, `unpatched` is `own`
with Megatron's faults in states of the optimizer.
"""

from __future__ import annotations

from pathlib import Path

from tests.launch import ROOT, Run, run_pretrain

MODEL = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 "
    "--vocab-size 255 --position-embedding-type rope --hidden-dropout 0 --attention-dropout 0 --swiglu "
    "--disable-bias-linear --mock-data --micro-batch-size 1 --global-batch-size 4 --lr 2e-3 --lr-decay-style constant "
    "--log-interval 1 --eval-iters 0 --num-workers 0"
)
GPT = (
    "--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm --no-rope-fusion "
    "--eval-interval 100"
)
SPEC = f"{GPT} --no-create-attention-mask-in-dataloader --spec lightning_megatron.spec lightning_spec"
BARE = "--lightning-gate none --lightning-norm none"
HYBRID = "--linear-attention-freq 4 --attention-output-gate"  # all layers have projections of the same shapes
LEGACY = "--ckpt-format torch"
MUP = "--use-mup --mup-output-mult 0.4 --lightning-scale 0.2"  # no part of the function follows the base
TRACKER = "latest_checkpointed_iteration.txt"
# The checkpoints that are loaded: way of starting, flags.
SAVED = {
    "own": ("own", HYBRID),
    "own-bare": ("own", f"--linear-attention-freq 4 {BARE}"),
    "own-legacy": ("own", f"{HYBRID} {LEGACY}"),
    "own-minimax": ("own", f"{HYBRID} --lightning-decay minimax"),
    "own-wsd": (
        "own", f"{HYBRID} --lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-warmup-iters 1 --decoupled-lr 1e-3 "
        "--untie-embeddings-and-output-weights",
    ),
    "own-mup": ("own", f"{HYBRID} {MUP} --mup-base-hidden-size 32"),
    "gpt": ("gpt", f"{HYBRID} {SPEC}"),
    "gpt-minimax": (
        "gpt", f"{HYBRID} {SPEC.replace('lightning_megatron.spec lightning_spec', 'tests.specs minimax_spec')}",
    ),
    "plain": ("gpt", GPT),
}  # fmt: skip


def start(way: str, flags: str, *, save: Path | None = None, load: Path | None = None, check: bool = True) -> Run:
    """Four iterations, or with ``save`` the first two of them."""
    stopping = f"--save {save} --save-interval 2 --exit-interval 2" if save else ""
    nproc = 2 if "parallel-size 2" in flags else 1
    scripts = {"gpt": "pretrain_gpt.py", "unpatched": "helpers/unpatched_pretrain.py"}
    script = ROOT / "tests" / scripts[way] if way in scripts else None
    loading = f"--load {load}" if load else ""
    length, model = "" if "--train-samples" in flags else "--train-iters 4", MODEL
    if "--step-batch-size-schedule" in flags:
        model = MODEL.replace("--global-batch-size 4 ", "")
    arguments = f"{model} {length} {flags} {stopping} {loading}".split()  # the later of two flags counts
    return run_pretrain(arguments, nproc, script=script, check=check)


def refusal(run: Run) -> str:
    assert not run.ok and not run.losses, f"it went on with losses {run.losses}"
    return run.log


def refused(checkpoint: Path, way: str, flags: str, message: str) -> str:
    """The log of a run that goes on from a checkpoint in vain, and says ``message``."""
    log = refusal(start(way, flags, load=checkpoint, check=False))
    assert message in log
    if way == "own":  # the message alone, and status 2
        assert "\nlightning-pretrain: " in log and "Traceback" not in log
    return log
