"""Rows of the tables of flags about memory, graphs and optimizers: recompute, inputs on the host, what is captured."""

from __future__ import annotations

import importlib

import torch

from ..compat import importable
from .rules import TE, Rule, Run, flag_of, selective

_CHUNK, _OFFLOAD = "lightning_recompute_chunk", "lightning_offload_activations"
_FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

REFUSED = (
    *(
        Rule(name, when, text)
        for name in (_CHUNK, _OFFLOAD)
        for when, text in (
            (lambda run: not run.recomputes, f"acts on layers that are recomputed; add {_FULL}, or leave it out"),
            (
                lambda run: run.graphs,
                "does not go with CUDA graphs, in which nothing is recomputed; use --cuda-graph-impl none",
            ),
        )
    ),
    Rule(
        _CHUNK,
        lambda run: run.get("fp8") or run.get("fp4"),
        "does not go with --fp8-format and --fp4-format, whose scales and kept values are of a whole layer; leave out "
        "one of the two",
    ),
    Rule(
        "lightning_recompute_qkv",
        lambda run: not selective(run, "core_attn"),
        "begins the recomputation of core_attn at the fused projection; add --recompute-granularity selective "
        "--recompute-modules core_attn, or leave it out",
    ),
    Rule(
        _OFFLOAD,
        lambda run: run.config.distribute_saved_activations,
        "moves whole inputs, and --distribute-saved-activations cuts them; leave out one of the two",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.recompute_method == "uniform" and run.config.recompute_num_layers != 1,
        "recomputes layers one by one; use --recompute-num-layers 1",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.hidden_dropout > 0,
        "would drop other elements when it recomputes; use --hidden-dropout 0",
    ),
    *(
        Rule(_CHUNK, lambda run, name=name: run.get(name), f"does not go with {flag}; {remedy}")
        for name, flag, remedy in (
            (
                "gradient_accumulation_fusion",
                "gradient accumulation fusion, as it sums gradients of weights by itself",
                "use --no-gradient-accumulation-fusion",
            ),
            ("tp_comm_overlap", "--tp-comm-overlap, whose buffers have one size", "leave that out"),
            ("delay_wgrad_compute", "--delay-wgrad-compute", "leave that out"),
        )
    ),
    Rule(
        "cpu_offloading",
        lambda run: not importable(TE),
        f"needs TransformerEngine, and it does not import; use --lightning-offload-activations with {_FULL}, or "
        "install it",
        "--cpu-offloading-num-layers",
    ),
    Rule(
        "cpu_offloading",
        lambda run: run.get("hybrid_layer_pattern"),
        "is not read by HybridModel, which would keep all on the GPU (Megatron 0.19); use GPTModel, or "
        f"--lightning-offload-activations with {_FULL}",
        "--cpu-offloading-num-layers",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.context_parallel_size > 1 and not run.options.cp_keep_states,
        "keeps states for the recomputation; leave --no-lightning-cp-keep-states out",
    ),
)


def _captures_experts(run: Run) -> bool:
    """Whether graphs hold experts whose tokens are counted on the host. Megatron's ``local`` captures the layers of a
    GPTModel in training as a whole whatever the modules; HybridModel's layers with experts know theirs. A graph of the
    full iteration holds all layers of any model, in evaluation, too.
    """
    config, impl = run.config, run.get("cuda_graph_impl")
    padded = config.moe_expert_capacity_factor is not None and config.moe_pad_expert_input_to_capacity
    counted = config.num_moe_experts and config.moe_token_dispatcher_type != "flex" and not padded
    inference = run.get("skip_train") or config.moe_pad_experts_for_cuda_graph_inference
    if not counted or impl == "full_iteration":
        return bool(counted)
    if inference or run.get("hybrid_layer_pattern"):
        return False
    return impl == "local" or (impl == "transformer_engine" and not run.graphed)


GRAPHS = (
    Rule(
        "cuda_graph_modules",
        lambda run: run.get("cuda_graph_impl") == "local" and "mlp" in run.graphed and "attn" not in run.graphed,
        "ends in an AttributeError of Megatron's layers with --cuda-graph-impl local; give attn, or leave "
        "--cuda-graph-modules out for whole layers",
    ),
    Rule(
        "cuda_graph_impl",
        lambda run: run.graphs and run.packed,
        "captures a batch of one shape, and packed documents (--sft, --dataloader-inter-document-masking) differ in "
        "number from batch to batch; use --cuda-graph-impl none",
    ),
    Rule(
        "cuda_graph_impl",
        _captures_experts,
        "captures layers as a whole, and experts that take any number of tokens ask for it while they run (a CUDA "
        "error of the capture); use --cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router, or "
        "--moe-expert-capacity-factor with --moe-pad-expert-input-to-capacity",
    ),
    Rule(
        "cuda_graph_impl",
        lambda run: run.get("cuda_graph_impl") == "transformer_engine" and not importable(TE),
        "captures with TransformerEngine's functions, and it does not import: use local or full_iteration, or install "
        "it",
    ),
)


def _scales_twice() -> bool:
    """Whether the package's step scales what Megatron's class has scaled already, by a value that this does not set."""
    try:
        package = importlib.import_module("emerging_optimizers.orthogonalized_optimizers.adaptive_muon")
    except ImportError:
        return False
    return hasattr(package.AdaptiveMuon, "_apply_muon_scale")


_EMERGING = ("muon", "dist_muon", "adaptive_muon", "lion", "soap")
_GRAPH = "optimizer_cuda_graph"  # replays the kernels of one step, with the numbers that they were launched with
OPTIMIZERS = (
    *(
        Rule(_GRAPH, when, text)
        for when, text in (
            (
                lambda run: run.get("optimizer") not in (None, "adam") or run.get("optimizer_cpu_offload"),
                "would train on with the learning rate of the step that it captures, as only Adam on the GPU reads its "
                "own from the device (Megatron 0.19); use --optimizer adam without --optimizer-cpu-offload, or leave "
                "it out",
            ),
            (
                lambda run: not importable(TE),
                "needs TransformerEngine's Adam and norm of gradients, and it does not import: torch's and apex's ask "
                "for the norm in the captured step (a CUDA error), and with --clip-grad 0 torch's trains on with the "
                "learning rate of that step; leave it out, or install TransformerEngine",
            ),
            (
                lambda run: run.config.fp16,
                "captures the step, which asks --fp16 whether gradients overflowed (a CUDA error); use --bf16, or "
                "leave it out",
            ),
            (
                lambda run: run.get("weight_decay_incr_style") not in (None, "constant"),
                "would train on with the weight decay of the step that it captures; use --weight-decay-incr-style "
                "constant, or leave it out",
            ),
        )
    ),
    Rule(
        "optimizer",
        lambda run: run.get("optimizer") in _EMERGING and run.config.fp16,
        "has no loss scale in Megatron, and --fp16 needs one; use --bf16",
    ),
    Rule(
        "optimizer",
        lambda run: (
            run.get("optimizer") in _EMERGING
            and not run.config.bf16
            and any(run.get(x) for x in ("use_distributed_optimizer", "use_layer_wise_distributed_optimizer"))
        ),
        "ends Megatron 0.19 in an AttributeError (get_loss_scale) where it is distributed in fp32; use --bf16, or "
        "leave --use-distributed-optimizer out",
    ),
    Rule(
        "optimizer",
        lambda run: run.get("optimizer") == "sgd" and run.get("use_distributed_optimizer"),
        "does not go with --use-distributed-optimizer (an assertion in Megatron 0.19); leave that out, or use adam",
    ),
    Rule(
        "optimizer",
        lambda run: run.get("optimizer") in _EMERGING and not importable("emerging_optimizers"),
        "needs the package emerging-optimizers, and it does not import; pip install emerging-optimizers, or use adam "
        "or sgd",
    ),
    Rule(
        "optimizer_cpu_offload",
        lambda run: not (run.config.bf16 or run.config.fp16),
        "ends Megatron 0.19 in a ValueError in fp32 (can't optimize a non-leaf Tensor); use --bf16, or leave it out",
    ),
    Rule(
        "async_save",  # without --use-persistent-ckpt-worker Megatron saves at once, and says so
        lambda run: run.get("use_persistent_ckpt_worker") and not torch.cuda.is_available(),
        "needs CUDA devices, without which its worker dies and the run hangs (Megatron 0.19); leave it out",
    ),
    Rule(
        "ckpt_format",
        lambda run: run.get("use_torch_fsdp2") and run.get("ckpt_format") == "torch_dcp" and run.get("load"),
        "can be saved, and not loaded (a TypeError in Megatron 0.19); use --use-megatron-fsdp, or --ckpt-format "
        "torch_dist, whose weights load with --no-load-optim or --finetune",
    ),
    Rule(
        "use_torch_fsdp2",
        lambda run: run.get("load") and not (run.get("no_load_optim") or run.get("finetune")),
        "does not go on where it stopped: Megatron 0.19 loads Adam's states without the number of its steps; use "
        "--use-megatron-fsdp, or add --no-load-optim or --finetune for the weights alone",
    ),
    Rule(
        "use_torch_fsdp2",
        lambda run: not torch.cuda.is_available(),
        "needs CUDA devices, to which torch's fully_shard moves parameters; use --use-megatron-fsdp, or leave it out",
    ),
    Rule(
        "use_megatron_fsdp",
        lambda run: (
            any(run.get(x) for x in ("save", "load", "pretrained_checkpoint"))
            and run.config.gated_linear_unit
            and not (run.config.bf16 or run.config.fp16)
        ),
        "can neither save nor load --swiglu in fp32 (Megatron 0.19 ends in an AttributeError); use --bf16, or leave "
        "--save and --load out",
    ),
    Rule(
        "use_megatron_fsdp",
        lambda run: (
            run.get("save") and not run.get("no_save_optim") and not (importable(TE) or importable("apex.optimizers"))
        ),
        "hangs when it saves the states of torch's Adam, which a rank has only of parameters that it holds a part of "
        "(Megatron 0.19); add --no-save-optim, or install TransformerEngine or apex for their Adam",
    ),
    Rule(
        "use_megatron_fsdp",
        lambda run: (
            (run.config.bf16 or run.config.fp16)
            and (run.get("load") or run.get("pretrained_checkpoint"))
            and (run.get("no_load_optim") or run.get("finetune"))
        ),
        "cannot load weights without the optimizer's in bf16 and fp16 (NotImplementedError in Megatron 0.19); leave "
        "--no-load-optim and --finetune out, or train in fp32",
    ),
    *(
        Rule(name, when, "needs the package einops, and it does not import; pip install einops")
        for name, when in (
            ("use_megatron_fsdp", lambda run: not importable("einops")),
            (
                "num_distributed_optimizer_instances",
                lambda run: run.get("num_distributed_optimizer_instances") > 1 and not importable("einops"),
            ),
        )
    ),
    Rule(
        "optimizer",
        lambda run: run.get("optimizer") == "adaptive_muon" and _scales_twice(),
        "ends Megatron 0.19 in an AttributeError (scale_mode) in the first step, with this version of the package "
        "emerging-optimizers; use muon",
    ),
    Rule(
        "optimizer",
        lambda run: (
            run.get("optimizer") == "soap"
            and run.get("save")
            and not run.get("no_save_optim")
            and run.get("ckpt_format") != "torch"
        ),
        "cannot be saved in Megatron 0.19: its preconditioners are no shape of a parameter (an AssertionError at the "
        "first save); use --ckpt-format torch, or --no-save-optim",
    ),
    *(
        Rule(
            name,
            lambda run, name=name, default=default: run.get("optimizer") == "lion" and run.get(name) != default,
            "is not read with --optimizer lion by Megatron 0.19, which takes "
            f"{flag_of(name.replace('lion', 'adam'))}; give that",
        )
        for name, default in (("lion_beta1", 0.95), ("lion_beta2", 0.98))
    ),
)

WARNED = (
    Rule(
        "use_torch_fsdp2",
        lambda run: run.get("save") and not run.get("no_save_optim"),
        "saves states of the optimizer with which no run can go on (Megatron 0.19 does not load the number of its "
        "steps); use --use-megatron-fsdp",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.context_parallel_size > 1,
        "computes the MLPs in chunks, and attention whole: chunks of lightning layers need the whole sequence on one "
        "context-parallel rank",
    ),
    Rule(
        _CHUNK,
        lambda run: run.config.num_moe_experts is not None,
        "leaves layers with experts whole",
    ),
    Rule(_CHUNK, lambda run: run.mtp, "leaves multi-token prediction layers whole"),
    Rule(
        "mlp_chunks_for_training",
        lambda run: run.config.mlp_chunks_for_training > 1 and run.recomputes,
        "keeps what all chunks computed in the backward, and so does not lower its peak; use "
        "--lightning-recompute-chunk",
    ),
)
