"""Training speed of models shaped like released ones, with this package's operator and with others' in the same layer.

    python -m tests.benchmarks.released --out tests/benchmarks/results

Ring-mini (4:1, grouped heads) and Ling-2.5 (7:1, multi-latent attention) at about 1B parameters, dense: forward,
backward and fused AdamW in bf16, full recompute, loss in chunks of 8K, one GPU. The operators differ in
``LightningAttention`` alone: ours; fla's ``chunk_simple_gla``; and fla's token-by-token ``fused_recurrent_simple_gla``,
which ms-swift's mcore-bridge trains Ling-2.5 with. Prints tokens/s, MFU and peak memory, and writes released.json.

MFU is of 989 TFLOP/s. Operations of a token: 6 for each parameter in matrices (not the embedding), 3 * 4 K V H for each
lightning layer, and 3 T H (d + e) for each softmax layer with head dims d of keys and e of values, as it sees T/2
tokens on average. Recomputation is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from .report import write
from .training import machine, when

PEAK = 989e12  # FLOP/s, an H100 SXM in bf16
LENGTHS = {8192: 4, 32768: 1, 131072: 1}  # tokens of a sequence -> sequences
LOSS_CHUNK = 8192
SIZES = {
    "ring-mini, 4:1 GQA": (
        "ring-mini-linear-2.0",
        dict(num_hidden_layers=20, vocab_size=32000, num_experts=None),
    ),
    "ling-2.5, 7:1 MLA": (
        "ling-2.5-1t",
        dict(
            num_hidden_layers=16, hidden_size=2048, num_attention_heads=16, num_key_value_heads=16, vocab_size=32000,
            intermediate_size=5632, q_lora_rank=768, num_experts=None, group_norm_size=4,
            num_nextn_predict_layers=0,
        ),
    ),
}  # fmt: skip


def config_of(name: str) -> dict:
    """config.json of one of ``SIZES``."""
    from lightning_megatron.models.presets import preset_config

    preset, changes = SIZES[name]
    return {key: value for key, value in (preset_config(preset) | changes).items() if value is not None}


def operators() -> dict[str, Callable | None]:
    """What takes the place of ``mixer.lightning_attn``; None: nothing."""
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    def call(function, q, k, v, log_decay, *, scale, **others):
        return function(q, k, v, g_gamma=log_decay, scale=scale)[0], None

    functions = {"fla chunk": chunk_simple_gla, "fla recurrent": fused_recurrent_simple_gla}
    return {"ours": None, **{name: partial(call, function) for name, function in functions.items()}}


def flops(args, matrices: int, length: int) -> float:
    """Operations of one token, see the module's docstring."""
    from lightning_megatron.config import lightning_pattern

    pattern = lightning_pattern(args.linear_attention_freq, args.num_layers)
    heads, d = args.num_attention_heads, args.kv_channels
    latent = args.multi_latent_attention
    dims = args.qk_head_dim + args.qk_pos_emb_head_dim + args.v_head_dim if latent else 2 * d
    return 6 * matrices + sum(pattern) * 12 * d * d * heads + pattern.count(False) * 3 * length * heads * dims


def build(name: str):
    """The model on the GPU in bf16, and its args."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    from lightning_megatron.models.family import command_line, family_of
    from lightning_megatron.record import options_from_args
    from lightning_megatron.spec import make_spec
    from lightning_megatron.training.models import saved_args

    config = config_of(name)
    words = command_line(family_of(config).flags(config))
    recompute = "--bf16 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    args = saved_args([*words, *recompute.split(), "--seq-length", str(max(LENGTHS))])
    transformer = core_transformer_config_from_args(args)
    model = gpt_config_from_args(args, config=transformer)
    model.transformer_layer_spec = make_spec(options_from_args(args))
    built = GPTModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups()).cuda()
    return Float16Module(transformer, built), args


def measure(model, args, length: int, steps: int) -> tuple[list[float], float]:
    """Seconds of steps after a first one, and peak memory in GiB."""
    from lightning_megatron.training.loss import chunked_loss

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    positions = torch.arange(length, device="cuda")[None]
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps + 1):
        tokens = torch.randint(0, args.vocab_size, (LENGTHS[length], length), device="cuda")
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(
            tokens, positions, None, labels=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.float32),
            output_processor=partial(chunked_loss, backend=None), output_processor_context=LOSS_CHUNK,
        )  # fmt: skip
        loss.float().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[1:], torch.cuda.max_memory_allocated() / 2**30


def rows(models: list[str], only: list[str], lengths: list[int]) -> Iterator[dict]:
    """One of every model, length and operator, as soon as it is measured."""
    for name in models:
        model, args = build(name)
        parameters = sum(p.numel() for p in model.parameters())
        matrices = parameters - args.padded_vocab_size * args.hidden_size
        for operator, function in operators().items():
            if operator not in only:
                continue
            for length in lengths:
                row = dict(model=name, operator=operator, length=length, parameters=parameters)
                replaced = mock.patch("lightning_megatron.mixer.lightning_attn", function)
                try:
                    steps = 1 if operator == "fla recurrent" and length > 32768 else 3
                    if function is None:
                        seconds, peak = measure(model, args, length, steps)
                    else:
                        with replaced:
                            seconds, peak = measure(model, args, length, steps)
                except torch.OutOfMemoryError:
                    yield row | dict(error="does not fit")
                    continue
                speed = LENGTHS[length] * length / statistics.median(seconds)
                mfu = speed * flops(args, matrices, length) / PEAK
                yield row | dict(tokens_per_second=speed, mfu=mfu, peak_gib=peak, seconds=seconds)
                torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--operators", nargs="+", default=["ours", "fla chunk", "fla recurrent"])
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(argv)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("nccl", world_size=1, rank=0)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    words = sys.argv[1:] if argv is None else argv
    about = (
        machine(cpu=False) | when() | dict(commands=[shlex.join(["python", "-m", "tests.benchmarks.released", *words])])
    )
    found: list[dict] = []
    for row in rows(options.models, options.operators, options.lengths):
        found.append(row)
        shown = {key: f"{value:,.3g}" if isinstance(value, float) else value for key, value in row.items()}
        print(json.dumps(shown), flush=True)
        write(options.out / "released.json", about, "released", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
