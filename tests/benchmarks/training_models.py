"""What tests.benchmarks.training trains: model shapes, their operations per token, batches, Megatron's flags, commands.

MFU is of 989 TFLOP/s, an H100 SXM in bf16 without sparsity, for layers in fp8 as well. Operations of a token, forward
and backward, recomputation not counted, for P parameters in matrices (the output layer is one, the embedding is not),
head dims K = V = h / H, length T:

    6 P  +  3 * 4 K V H for each lightning layer  +  3 * 2 T h for each softmax layer

A multiply-add is 2 operations, backward twice forward. A lightning head needs k^T v and q S, 2 K V each, at the least,
by whichever chunks a kernel computes them; softmax needs q k^T and p v with the T/2 tokens that a token sees on
average.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from dataclasses import dataclass

PEAK = 989e12  # FLOP/s
WARMUP = 2  # the first step compiles, and Megatron's log gives the second as the mean of both
PROFILED = 2  # steps
HYBRID = 8


@dataclass(frozen=True)
class Model:
    """A decoder like TransNormerLLM's: SwiGLU, RMSNorm, no biases, embedding and output layer apart."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int = 32000
    ffn: int = 0  # 8/3 of hidden, rounded up
    kv_heads: int = 0  # as many as heads, of lightning and softmax

    def __post_init__(self) -> None:
        object.__setattr__(self, "ffn", self.ffn or math.ceil(8 / 3 * self.hidden / 256) * 256)
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)

    def softmax_layers(self, attention: str) -> int:
        period = {"lightning": self.layers + 1, "softmax": 1, "hybrid": min(HYBRID, self.layers)}[attention]
        return self.layers // period

    def matrices(self, attention: str, vocabulary: int | None = None) -> int:
        """Parameters that are multiplied with every token: q, k, v, gate (lightning only), output, MLP, vocabulary."""
        softmax = self.softmax_layers(attention)
        square = 3 * (self.layers - softmax) + 2 * softmax + 2 * self.layers * self.kv_heads / self.heads
        mlp = 3 * self.layers * self.ffn
        return round(self.hidden * (square * self.hidden + mlp + (vocabulary or self.vocabulary)))

    def flops(self, attention: str, length: int, vocabulary: int | None = None) -> float:
        """Operations of one token, see the module's docstring."""
        softmax = self.softmax_layers(attention)
        lightning = (self.layers - softmax) * 12 * self.hidden * (self.hidden // self.heads)
        return 6 * self.matrices(attention, vocabulary) + lightning + softmax * 6 * length * self.hidden


MODELS = {
    "toy": Model(2, 64, 2, 512),
    "0.4B": Model(24, 1024, 8),
    "1B": Model(16, 2048, 16),
    "3B": Model(36, 2560, 20),
    "8B": Model(32, 4096, 32, ffn=14336, kv_heads=8),
}


def parse_length(text: str) -> int:
    """Tokens of "92K", "1M" or "94208"."""
    factor = {"K": 1024, "M": 1024**2}.get(text[-1:].upper(), 1)
    return int(text[:-1]) * factor if factor > 1 else int(text)


def show_length(length: int) -> str:
    return str(length) if length % 1024 else f"{length // 1024}K"


PARALLEL = {"tensor_parallel": "TP", "context_parallel": "CP", "data_parallel": "DP"}  # options that multiply the GPUs
# What tells a row of the table from the others
KEY = ("model", "attention", "length", "recompute", *PARALLEL, "cuda_graph", "loss_chunk", "extra", "layers")
_TE = "--transformer-impl transformer_engine"
LAYERS = {  # Megatron's flags for what computes projections, MLPs and norms, and in which precision
    "local": "--transformer-impl local",
    "te": _TE,
    "te-delayed": f"{_TE} --fp8-format hybrid --fp8-recipe delayed --fp8-amax-history-len 1024 "
    "--fp8-amax-compute-algo max",
    "te-tensorwise": f"{_TE} --fp8-format hybrid --fp8-recipe tensorwise",
    "te-blockwise": f"{_TE} --fp8-format e4m3 --fp8-recipe blockwise",
}


def key_of(row: dict) -> tuple:
    """Rows of older files have local layers."""
    return tuple(row.get(name, "local") if name == "layers" else row[name] for name in KEY)


def how(row: dict) -> str:
    """How a row was trained, beyond model and attention."""
    text = f", {layers}" if (layers := row.get("layers", "local")) != "local" else ""
    text += f", recompute {row['recompute']}" if row["recompute"] != "none" else ""
    text += "".join(f", {short}{row[name]}" for name, short in PARALLEL.items() if row[name] > 1)
    graph = row["cuda_graph"]  # True: of the whole step
    text += ", CUDA graph" + ("" if graph is True else f" {graph}") if graph else ""
    text += f", loss of {show_length(row['loss_chunk'])}" if row["loss_chunk"] else ""
    return text + (f", {row['extra']}" if row["extra"] else "")


def graph_flags(graph: str | bool) -> str:
    """Megatron's flags for CUDA graphs: True for the whole step, or an implementation and what of layers it captures,
    as in "local:attn"; without modules, whole layers.
    """
    impl, _, modules = (graph if isinstance(graph, str) else "full_iteration").partition(":")
    text = f"--cuda-graph-impl {impl} --cuda-graph-warmup-steps 1"
    text += f" --cuda-graph-modules {modules.replace(',', ' ')}" if modules else ""
    return text + (" --no-check-for-nan-in-loss-and-grad" if impl == "full_iteration" else "")


def batch(length: int, options: argparse.Namespace) -> tuple[int, int]:
    """Sequences in a microbatch and in a step of all GPUs, for equal tokens."""
    micro = max(1, options.tokens_per_microbatch // length)
    together = micro * options.data_parallel
    return micro, together * max(1, round(options.tokens_per_step / (together * length)))


def gpus(options: argparse.Namespace) -> int:
    return math.prod(getattr(options, name) for name in PARALLEL)


def flags(name: str, attention: str, lengths: list[int], options: argparse.Namespace) -> list[str]:
    """Megatron's flags for a model that starts at the first length and must be able to take all."""
    model, (micro, whole), tp = MODELS[name], batch(lengths[0], options), options.tensor_parallel
    steps = options.steps + PROFILED * options.profile
    text = f"""
        --num-layers {model.layers} --hidden-size {model.hidden} --num-attention-heads {model.heads} --swiglu
        --ffn-hidden-size {model.ffn} --normalization RMSNorm --disable-bias-linear
        --untie-embeddings-and-output-weights
        --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0 --seq-length {lengths[0]}
        --max-position-embeddings {max(lengths)} --micro-batch-size {micro} --global-batch-size {whole}
        --train-iters {steps} --lr 1e-4 --lr-decay-style constant --weight-decay 0.1 --clip-grad 1.0 --bf16
        --use-distributed-optimizer --cross-entropy-loss-fusion --log-interval 1 --log-memory-interval 1 --eval-iters 0
    """
    if model.kv_heads < model.heads:
        text += f" --lightning-num-kv-heads {model.kv_heads}" if attention != "softmax" else ""
        text += f" --group-query-attention --num-query-groups {model.kv_heads}" if attention != "lightning" else ""
    if attention == "hybrid":
        text += f" --linear-attention-freq {min(HYBRID, model.layers)}"
    if options.cuda_graph:  # captured in the first or second step, which WARMUP drops
        text += " " + graph_flags(options.cuda_graph)
    if options.context_parallel > 1:
        text += f" --context-parallel-size {options.context_parallel}"
    if options.context_parallel * options.data_parallel > 1:
        text += " --overlap-grad-reduce --overlap-param-gather"
    if options.loss_chunk:
        text += f" --lightning-loss-chunk {options.loss_chunk}"
    if tp > 1:
        text += f" --tensor-model-parallel-size {tp} --sequence-parallel"
    if options.recompute == "full":
        text += " --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    elif options.recompute:
        modules = options.recompute.split(",")
        qkv = " --lightning-recompute-qkv" if "qkv" in modules else ""
        modules = " ".join(name for name in modules if name != "qkv")
        text += f" --recompute-granularity selective --recompute-modules {modules}{qkv}"
    data = f"--mock-data --tokenizer-type NullTokenizer --vocab-size {model.vocabulary - 1}".split()
    if options.data:
        data = ["--data-path", options.data, "--split", "1,0,0", "--tokenizer-type", "SentencePieceTokenizer"]
        data += ["--tokenizer-model", options.tokenizer]
    return text.split() + LAYERS[options.layers].split() + data + shlex.split(options.extra)


def command(
    name: str, attention: str, lengths: list[int], options: argparse.Namespace, rows: str = "ROWS"
) -> list[str]:
    """What trains at all ``lengths`` in one process per GPU; without --in-process there is one length."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    line += [f"--nproc-per-node={gpus(options)}", *(["examples/cpu_shim.py"] if options.cpu else [])]
    cells = [(length, *batch(length, options)) for length in lengths] if options.in_process else []
    plan = dict(softmax=attention == "softmax", cells=cells, warmup=WARMUP, steps=options.steps)
    plan |= dict(profiled=PROFILED * options.profile, rows=rows)
    if cells or plan["softmax"]:
        line += ["-m", "tests.benchmarks.training_run", json.dumps(plan)]
    else:
        line += ["-m", "lightning_megatron.pretrain"]
    return line + flags(name, attention, lengths, options)
