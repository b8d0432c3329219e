"""Options of a training run, and rows of them in which every two values occur together (a covering array).

Written here, since allpairspy takes no seed, and ends without a word where constraints leave pairs behind.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import combinations, product

from tests.helpers.training import LATENT, RECOMPUTE

Row = dict[str, str]  # factor -> value
EXPERTS = "--num-experts 4 --moe-layer-freq 2 --moe-ffn-hidden-size 64 --moe-router-load-balancing-type none"
SHARED = (
    "--moe-router-topk 2 --moe-shared-expert-intermediate-size 32 --moe-token-dispatcher-type alltoall "
    "--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-dtype fp32"
)
FACTORS_OF_RESIDUALS = " ".join(
    f"--lightning-{part}-{factor} {value}"
    for part, alpha, beta in (("attn", 1.5, 0.8), ("softmax", 0.7, 1.2), ("mlp", 1.3, 0.6))
    for factor, value in (("alpha", alpha), ("beta", beta))
)
# value -> its flags. The first value of a factor is the default.
OWN = {
    "layers": {
        "all": "", "3:1": "--linear-attention-freq 4", "1:1": "--linear-attention-freq 2",
        "listed": "--linear-attention-freq ([0,1,1,0])",
    },
    "softmax": {
        "plain": "", "gqa": "--group-query-attention --num-query-groups 2 --qk-layernorm",
        "mla": LATENT.replace(" --lightning-rotary-percent 0.5", ""), "gate": "--attention-output-gate",
    },
    "mlp": {
        "gelu": "", "swiglu": "--swiglu", "bilinear": "--swiglu --lightning-bilinear-glu", "relu2": "--squared-relu",
        "quick-geglu": "--quick-geglu --no-bias-gelu-fusion --glu-linear-offset 1 --activation-func-clamp-value 7",
        "moe": EXPERTS, "moe-shared": f"{EXPERTS} {SHARED} --swiglu",
    },
    "mtp": {"0": "", "1": "--mtp-num-layers 1", "2": "--mtp-num-layers 2",
        "1 lightning": "--mtp-num-layers 1 --lightning-mtp-attention lightning"},
    "bias": {"none": "--disable-bias-linear", "all": "", "qkv": "--disable-bias-linear --add-qkv-bias"},
    "layer norm": {
        "layer": "", "rms": "--normalization RMSNorm", "rms-1p": "--normalization RMSNorm --apply-layernorm-1p",
        "plain": "--normalization RMSNorm --no-lightning-layernorm-affine",
    },
    "residual": {
        "plain": "", "factors": FACTORS_OF_RESIDUALS, "post": "--apply-residual-connection-post-layernorm",
        "embedding": "--lightning-embedding-scale 4",
    },
    "embeddings": {"tied": "", "untied": "--untie-embeddings-and-output-weights"},
    "positions": {
        "none": "--position-embedding-type none", "learned": "--position-embedding-type learned_absolute",
        "rope": "--position-embedding-type rope", "all rope": "--position-embedding-type rope --lightning-rope",
        "half": "--position-embedding-type rope --lightning-rope --rotary-percent 0.5",
        "lrpe": "--position-embedding-type none --lightning-lrpe-layers 2",
    },
    "heads": {
        "equal": "", "2": "--lightning-num-kv-heads 2",
        "K<V": "--lightning-key-head-dim 16 --lightning-value-head-dim 32",
        "K>V": "--lightning-key-head-dim 32 --lightning-value-head-dim 16",
    },
    "decay": {x: f"--lightning-decay {x}" for x in ("tnl", "minimax", "paper", "alibi", "none")}
    | {"bailing": "--lightning-decay bailing --lightning-decay-offset 1"},
    "features": {x: f"--lightning-feature-map {x}" for x in ("silu", "silu-qkv", "none")},
    "q, k": {"plain": "", "norm": "--lightning-qk-norm", "scale": "--lightning-scale 0.5"},
    "norm": {
        "head": "", "group": "--lightning-norm group --lightning-norm-groups 2", "all": "--lightning-norm all",
        "none": "--lightning-norm none", "plain": "--no-lightning-norm-affine",
    },
    "gate": {x: f"--lightning-gate {x}" for x in ("sigmoid", "linear", "none")},
}  # fmt: skip
RELEASED = {
    "released": {
        name: f"--lightning-model {name}@tiny"
        for name in ("ring-mini-linear-2.0", "ling-2.6-flash", "minimax-m1", "tnl-385m")
    }
}
PACKED = "--dataloader-inter-document-masking"
DATA = {  # FOLDER: where the files are
    "mock": "--mock-data", "text": "TEXT", "documents": f"TEXT {PACKED}",
    "documents, ends": f"TEXT {PACKED} --eod-mask-loss --reset-position-ids --calculate-per-token-loss",
    "sft": "CHATS", "sft answers": "CHATS --lightning-sft-answers-only --sft-tokenizer-prompt-format default",
}  # fmt: skip
TP, SP, PP, CP = (
    "--tensor-model-parallel-size", "--sequence-parallel", "--pipeline-model-parallel-size", "--context-parallel-size",
)  # fmt: skip
RUN = {
    "tp": {"1": "", "2": f"{TP} 2", "2 sp": f"{TP} 2 {SP}", "4 sp": f"{TP} 4 {SP}"},
    "pp": {
        "1": "", "2": f"{PP} 2", "2 vp": f"{PP} 2 --num-layers-per-virtual-pipeline-stage 1",
        "2 layout": f"{PP} 2 --pipeline-model-parallel-layout LAYOUT",
    },
    "cp": {
        "1": "", "2": f"{CP} 2", "2 again": f"{CP} 2 --no-lightning-cp-keep-states",
        **{f"{n} {x}": f"{CP} {n} --lightning-cp-exchange {x}"
           for n, x in ((2, "ring"), (2, "all-gather"), (4, "scan"), (4, "pipelined"))},
    },
    "dp": {"1": "", "2": ""},
    "ep": {"1": "", "2": "--expert-model-parallel-size 2", "2 etp": "--expert-model-parallel-size 2 "
           "--expert-tensor-parallel-size 1"},
    "optimizer": {
        "adam": "", "sgd": "--optimizer sgd --lr 1e-2", "sharded": "--use-distributed-optimizer",
        "overlap": "--overlap-grad-reduce",
        "sharded overlap": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    },
    "data": DATA,
    "samples": {"1": "--micro-batch-size 1", "2": "--micro-batch-size 2"},
    "recompute": {
        "none": "", "full": RECOMPUTE,
        "block": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
        "core": "--recompute-granularity selective --recompute-modules core_attn",
        "mlp": "--recompute-granularity selective --recompute-modules mlp",
        "chunk": f"{RECOMPUTE} --lightning-recompute-chunk 24", "host": f"{RECOMPUTE} --lightning-offload-activations",
        "chunk, host": f"{RECOMPUTE} --lightning-recompute-chunk 24 --lightning-offload-activations",
        "split": f"{RECOMPUTE} --distribute-saved-activations",
    },
    "loss": {"whole": "", "chunks": "--lightning-loss-chunk 40", "fused": "--cross-entropy-loss-fusion"},
    "precision": {
        "fp32": "", "bf16": "--bf16", "bf16, residual fp32": "--bf16 --fp32-residual-connection",
        "fp16": "--fp16 --initial-loss-scale 1",
    },
}  # fmt: skip
ALONE = ("data", "samples")  # with the model, the algorithm and the dtype: what one process has, too
MOST = int(os.environ.get("LIGHTNING_TEST_RANKS") or 2)  # of a run, at most


def ranks(row: Row) -> int:
    """Of the parallel sizes that a row, maybe a part of one, has."""
    total = 1
    for name in ("tp", "pp", "cp", "dp"):
        total *= int(row.get(name, "1").split()[0])
    return total


def matches(row: Row, where: dict[str, str]) -> bool:
    """Whether the row has one of the values, separated by |, of every factor; ! before them: none of them."""
    return all(
        name in row and (row[name] in values.lstrip("!").split("|")) != values.startswith("!")
        for name, values in where.items()
    )


def cover(
    factors: dict[str, dict[str, str]], allowed: Callable[[Row], bool], seed: int, impossible: list | None = None
) -> Iterator[Row]:
    """Rows until every two values of two factors occurred together, where ``allowed`` lets them.

    Greedy, as in AETG (Cohen et al. 1997): a row begins with a pair that is left, and takes, factor by factor in random
    order, the value that is in most pairs that are left; the best of some such rows.

    Args:
        allowed: for rows and parts of them; what is forbidden stays so with more factors.
        impossible: gets the pairs that are allowed, and for which no row was found.
    """
    rng, names = random.Random(seed), list(factors)
    left = {
        ((a, x), (b, y))
        for a, b in combinations(names, 2)
        for x, y in product(factors[a], factors[b])
        if allowed({a: x, b: y})
    }

    def grow(row: Row) -> Row | None:
        row = dict(row)
        for name in rng.sample(names, len(names)):
            if name in row:
                continue
            values = [x for x in rng.sample(list(factors[name]), len(factors[name])) if allowed({**row, name: x})]
            if not values:
                return None
            row[name] = max(values, key=lambda x: sum(_pair(names, (name, x), other) in left for other in row.items()))
        return {name: row[name] for name in names}

    while left:
        start = rng.choice(sorted(left))
        if not (found := [row for _ in range(8) if (row := grow(dict(start)))]):
            found = [row for _ in range(200) if (row := grow(dict(start)))]
        if not found:
            left.remove(start)
            if impossible is not None:
                impossible.append(start)
            continue
        row = max(found, key=lambda row: sum(pair in left for pair in combinations(row.items(), 2)))
        left.difference_update(combinations(row.items(), 2))
        yield row


def _pair(names: list[str], one: tuple[str, str], other: tuple[str, str]):
    return (one, other) if names.index(one[0]) < names.index(other[0]) else (other, one)


# ---- what is refused, as docs/options.md has it, and what is not run -------------------------------------------------

NO_SOFTMAX = {"layers": "all"}
TWO_STAGES, TWO_PARTS, TWO_RANKS = {"pp": "!1"}, {"cp": "!1"}, {"tp": "!1"}
DOCUMENTS = "documents|documents, ends|sft|sft answers"
CHUNKS = "chunk|chunk, host"
# values -> what the message says
REFUSED = (
    ({"softmax": "mla"} | NO_SOFTMAX, "--multi-latent-attention is the attention of softmax layers"),
    (
        {"residual": "factors", "mtp": "0|1 lightning"} | NO_SOFTMAX,
        "--lightning-softmax-alpha 0.7 is a factor of softmax layers",
    ),
    ({"positions": "lrpe", "heads": "2"}, "lrpe_layers=2 has angles for every head"),
    ({"mtp": "!0", "loss": "chunks"}, "is refused with --lightning-loss-chunk 40"),
    ({"released": "ling-2.6-flash", "loss": "chunks"}, "is refused with --lightning-loss-chunk 40"),
    ({"norm": "group", "tp": "4 sp"}, "norm_groups=2 must be divisible by tensor-parallel size 4"),
    ({"released": "!minimax-m1", "tp": "4 sp"}, "norm_groups=2 must be divisible by tensor-parallel"),
    ({"heads": "2", "tp": "4 sp"}, "2 key/value heads cannot be split over tensor-parallel size 4"),
    ({"mtp": "!0", "positions": "learned"}, "is not supported with learned_absolute position embedding"),
    ({"mtp": "!0", "embeddings": "tied"} | TWO_STAGES, "with tied embeddings and --pipeline-model-parallel-size above"),
    ({"mlp": "relu2", "bias": "all"}, "activation function should be either gelu, swiglu, or quick_geglu"),
    ({"mlp": "moe", "bias": "all"}, "--num-experts 4 has no fused activation with biases"),
    ({"mlp": "moe-shared", "bias": "all"}, "--num-experts 4 with --moe-shared-expert-intermediate-size has no biases"),
    ({"mlp": "moe|moe-shared", "tp": "2"}, "trains with --sequence-parallel only"),
    ({"released": "!tnl-385m", "tp": "2"}, "trains with --sequence-parallel only"),
    ({"recompute": "split", "mtp": "!0"}, "--distribute-saved-activations cuts inputs of layers in place"),
    ({"recompute": "split", "released": "ling-2.6-flash"}, "--distribute-saved-activations cuts inputs of layers"),
    ({"recompute": "mlp", "bias": "all"}, "--recompute-modules mlp never ends its backward with biases"),
    ({"data": DOCUMENTS, "samples": "2"} | TWO_STAGES, "needs --micro-batch-size 1, not 2"),
    ({"recompute": CHUNKS, "cp": "2 again"}, "leave --no-lightning-cp-keep-states out"),
)
# Not run here: too many ranks, or Megatron's own refusals, which say more about these tests than about this package.
LEFT_OUT = (
    ({"ep": "!1", "mlp": "!moe|moe-shared"}, "no experts"),
    ({"ep": "!1", "released": "tnl-385m"}, "no experts"),
    ({"ep": "!1", "dp": "1", "cp": "1"}, "no ranks to share experts"),
    ({"pp": "2 vp", "dp": "2", "samples": "2"}, "one microbatch for two stages"),
    ({"released": "ring-mini-linear-2.0", "pp": "2|2 vp"}, "5 layers"),
    ({"released": "tnl-385m", "pp": "2|2 vp"}, "3 layers"),
    ({"mlp": "moe-shared", "tp": "2 sp", "ep": "2"}, "gloo gathers no tensors of unequal sizes"),
    ({"recompute": "split", "tp": "!2"}, "nothing to split, or split already"),
)


def allowed(row: Row) -> bool:
    return ranks(row) <= MOST and not any(matches(row, where) for where, _ in (*REFUSED, *LEFT_OUT))
