"""Continue a prompt from a checkpoint, token by token.

    python examples/generate.py --load CKPT --tokenizer-model tokenizer.model --prompt "def main("     (with a GPU)
    python examples/cpu_shim.py examples/generate.py ...                                               (without)

The prompt is read in one forward pass; after it every token costs the same. A lightning layer keeps one K x V state a
head, however many tokens there were, a softmax layer keeps the keys and values of all of them: the sizes are printed at
the end. Model sizes and options come from what was saved in the checkpoint, so any parallel layout can be loaded, in
one process.
"""

from __future__ import annotations

import argparse
import importlib
import os
import time
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.module import Float16Module
from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args
from megatron.training.models.gpt import GPTModelBuilder

from lightning_megatron.mixer import LightningAttention
from lightning_megatron.record import saved_function
from lightning_megatron.spec import make_spec


def load_model(checkpoint: Path) -> tuple[torch.nn.Module, argparse.Namespace]:
    """The model of the newest iteration in ``checkpoint`` on this process's device, in its training dtype."""
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        raise SystemExit(
            f"--load {checkpoint}: no {tracker.name} there; give the folder that --save of the training named"
        )
    newest = tracker.read_text(errors="replace").strip()
    if newest != "release" and not newest.isdigit():
        raise SystemExit(f"{tracker} says {newest[:40]!r}: write the number of the last complete iter_ folder into it")
    folder = str(checkpoint / ("release" if newest == "release" else f"iter_{int(newest):07d}"))
    if not dist_checkpointing.check_is_distributed_checkpoint(folder):
        raise SystemExit(
            f"--load {checkpoint}: {folder}, which {tracker.name} names, is not there, or no complete checkpoint of "
            "Megatron's distributed format (--ckpt-format torch_dist); write the number of one that is into that file"
        )
    args = dist_checkpointing.load_common_state_dict(folder)["args"]
    args.tensor_model_parallel_size = args.pipeline_model_parallel_size = args.context_parallel_size = 1
    args.expert_model_parallel_size = args.expert_tensor_parallel_size = 1
    args.virtual_pipeline_model_parallel_size = args.pipeline_model_parallel_layout = None
    args.decoder_first_pipeline_num_layers = args.decoder_last_pipeline_num_layers = None
    args.account_for_embedding_in_pipeline_split = args.account_for_loss_in_pipeline_split = False
    args.sequence_parallel = False
    if args.mtp_num_layers:
        print(
            f"[{args.mtp_num_layers} multi-token prediction layers are left out: they only help training]", flush=True
        )
        args.mtp_num_layers = None
    options = saved_function(args).options
    if options is not None:
        args.spec = None
    else:
        check_spec(args.spec, checkpoint)

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    torch.distributed.init_process_group(backend="nccl", world_size=1, rank=0)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)

    config = core_transformer_config_from_args(args)
    model_config = gpt_config_from_args(args, config=config)
    if options is not None:
        model_config.transformer_layer_spec = make_spec(options)
    model = GPTModelBuilder(model_config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    model = model.to(torch.cuda.current_device())
    if args.bf16 or args.fp16:
        model = Float16Module(config, model).module
    model.eval()
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, folder)["model"]
    missing = [key for key in model.load_state_dict(state, strict=False).missing_keys if "_extra_state" not in key]
    if missing:
        raise SystemExit(f"--load {checkpoint}: the checkpoint lacks {', '.join(missing)}")
    return model, args


def check_spec(spec: list[str] | None, checkpoint: Path) -> None:
    """A checkpoint without options needs the spec it was trained with; Megatron ignores one that does not import."""
    if spec is None:
        raise SystemExit(f"--load {checkpoint}: it was trained without lightning_megatron, and has no lightning layers")
    module, _, name = " ".join(spec).partition(" ")
    try:
        getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SystemExit(
            f"--load {checkpoint}: it holds no lightning options, and the spec it was trained with, {module} {name}, "
            f"cannot be used here ({error}): put the folder of that module on PYTHONPATH"
        ) from error


@torch.inference_mode()
def generate(
    model: torch.nn.Module, tokens: list[int], count: int, *, temperature: float, length: int, vocab_size: int
):
    """Yield ``count`` tokens that continue ``tokens``; temperature 0 takes the likeliest. ``context`` holds the caches.

    The model's table is padded for tensor parallelism: its rows from ``vocab_size`` on are no tokens.
    """
    context = StaticInferenceContext(max_batch_size=1, max_sequence_length=length)
    device = next(model.parameters()).device
    read = tokens
    for _ in range(count):
        start = context.sequence_len_offset
        positions = torch.arange(start, start + len(read), device=device)[None]
        logits = model(torch.tensor([read], device=device), positions, None, inference_context=context)
        logits = logits[0, -1, :vocab_size].float()
        context.sequence_len_offset += len(read)
        token = int(logits.argmax() if temperature == 0 else torch.multinomial((logits / temperature).softmax(-1), 1))
        yield token, context
        read = [token]


def cache_sizes(model: torch.nn.Module, context: StaticInferenceContext) -> dict[str, int]:
    """Bytes kept after the last token, by kind of layer."""
    sizes = {"lightning": 0, "softmax": 0}
    for layer in model.decoder.layers:
        if isinstance(layer.self_attention, LightningAttention):
            sizes["lightning"] += sum(x.nbytes for x in context.key_value_memory_dict[layer.layer_number])
        else:  # allocated for the maximum length; used up to the offset
            memory = context.key_value_memory_dict[layer.layer_number]
            sizes["softmax"] += sum(x[: context.sequence_len_offset].nbytes for x in memory)
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, required=True, help="the folder that --save of the training named")
    parser.add_argument("--tokenizer-model", help="SentencePiece model (default: the one the training used)")
    parser.add_argument("--prompt", default="def main(")
    parser.add_argument("--chat", action="store_true", help="ask --prompt as a user, after training with --sft")
    parser.add_argument("--tokens", type=int, default=64, help="how many tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token each time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.tokens < 1 or options.temperature < 0:
        parser.error(f"--tokens {options.tokens} must be at least 1 and --temperature {options.temperature} at least 0")

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # every rank would load and print the same
        if int(os.environ.get("RANK", "0")) > 0:
            raise SystemExit(1)
        raise SystemExit(
            "generate.py runs in one process, whatever layout the checkpoint has: start it without torchrun"
        )
    model, args = load_model(options.load)
    if options.tokenizer_model:
        if args.tokenizer_type == "NullTokenizer":
            parser.error("--tokenizer-model: the training used NullTokenizer, which has no model; leave it out")
        args.tokenizer_model = options.tokenizer_model
    if options.chat and args.tokenizer_type != "SFTTokenizer":
        parser.error(f"--chat: the training used {args.tokenizer_type} and no --sft, so that there is no chat template")
    try:
        tokenizer = build_tokenizer(args)
        asked = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt
        tokens = tokenizer.tokenize(asked)
    except (OSError, RuntimeError, ValueError) as error:
        known = "numbers, such as --prompt '1 2 3'" if args.tokenizer_type == "NullTokenizer" else "--tokenizer-model"
        raise SystemExit(
            f"{args.tokenizer_type} {args.tokenizer_model or ''} cannot read --prompt {options.prompt!r}: {error}; "
            f"give {known}"
        ) from error
    if not tokens:
        parser.error(f"--prompt {options.prompt!r} has no tokens; give some text to continue")
    torch.manual_seed(options.seed)

    total = len(tokens) + options.tokens
    generated: list[int] = []
    shown = tokenizer.detokenize(tokens)
    print(shown, end="", flush=True)
    began = time.perf_counter()
    how = dict(temperature=options.temperature, length=total, vocab_size=tokenizer.vocab_size)
    for token, context in generate(model, tokens, options.tokens, **how):  # noqa: B007
        if options.chat and token == tokenizer.eod:
            break
        generated.append(token)
        text = tokenizer.detokenize(tokens + generated)
        if not text.endswith("\ufffd"):  # bytes of an unfinished character
            print(text[len(shown) :], end="", flush=True)
            shown = text
    seconds = time.perf_counter() - began
    sizes = cache_sizes(model, context)
    print(
        f"\n\n[{len(tokens)} prompt tokens, {len(generated)} generated, {len(generated) / seconds:.0f} tokens/s; "
        f"cache: lightning layers {sizes['lightning'] / 1024:.0f} KiB at any length, "
        f"softmax layers {sizes['softmax'] / 1024:.0f} KiB at this one]"
    )


if __name__ == "__main__":
    main()
