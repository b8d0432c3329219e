"""Rows of the tables of flags about optimizers: which ones run as asked, sharded or on the host, and can be saved."""

from __future__ import annotations

import importlib

import torch

from ..compat import importable
from ..config import flag_of
from ..optimizers import FLAGS
from .rules import TE, Rule


def _scales_twice() -> bool:
    """Whether the package's step scales what Megatron's class has scaled already, by a value that this does not set."""
    try:
        package = importlib.import_module("emerging_optimizers.orthogonalized_optimizers.adaptive_muon")
    except ImportError:
        return False
    return hasattr(package.AdaptiveMuon, "_apply_muon_scale")


_EMERGING = ("muon", "dist_muon", "adaptive_muon", "lion", "soap")
_GRAPH = "optimizer_cuda_graph"  # replays the kernels of one step, with the numbers that they were launched with
REFUSED = (
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
        lambda run: run.get("use_torch_fsdp2") and run.get("ckpt_format") == "torch_dcp" and run.loads,
        "can be saved, and not loaded (a TypeError in Megatron 0.19); use --use-megatron-fsdp, or --ckpt-format "
        "torch_dist, whose weights load with --no-load-optim or --finetune",
    ),
    Rule(
        "use_torch_fsdp2",
        # with --pretrained-checkpoint it begins anew
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
            (run.get("save") or run.loads) and run.config.gated_linear_unit and not (run.config.bf16 or run.config.fp16)
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
        lambda run: (run.config.bf16 or run.config.fp16) and run.loads_weights_alone,
        "cannot load weights without the optimizer's in bf16 and fp16 (NotImplementedError in Megatron 0.19); leave "
        "--no-load-optim, --finetune and --pretrained-checkpoint out, or train in fp32",
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
            lambda run, name=name: run.get("optimizer") == "lion" and run.get(name) != FLAGS[name].default,
            "is not read with --optimizer lion by Megatron 0.19, which takes "
            f"{flag_of(name.replace('lion', 'adam'))}; give that",
        )
        for name in ("lion_beta1", "lion_beta2")
    ),
)

WARNED = (
    Rule(
        "use_torch_fsdp2",
        lambda run: run.get("save") and not run.get("no_save_optim"),
        "saves states of the optimizer with which no run can go on (Megatron 0.19 does not load the number of its "
        "steps); use --use-megatron-fsdp",
    ),
)
