"""The released families on Megatron's layers against their references: every layer, logits and gradients, on ranks."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from lightning_megatron.parallel.interleave import interleave
from tests import layers
from tests.helpers import released
from tests.helpers.context_parallel import tokens_of
from tests.helpers.model_cases import DOCUMENTS, KINDS, LENGTH, MEGATRON, Case, difference, draw_case
from tests.launch import spawn

STATES, GRADS = 1e-5, 1e-4  # relative, in fp32 against fp64
# Cases of each kind, of which bailing has four: 12 were run in every layout, see docs/models.md.
COUNT = int(os.environ.get("LIGHTNING_TEST_MODELS", "1"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[bool, Path]:
    """Files with the cases, by whether their documents are packed."""
    from tests.conftest import SEED

    folder, files = tmp_path_factory.mktemp("cases"), {}
    for packed in (False, True):
        drawn = []
        for number, kind in enumerate(KINDS):
            seeds = range(SEED + 100 * number, SEED + 100 * number + COUNT)
            drawn += [draw_case(kind, seed, packed=packed, tied=seed > seeds[0]) for seed in seeds]
        files[packed] = folder / f"{packed}.pt"
        torch.save(drawn, files[packed])
    return files


LAYOUTS = {
    "one": dict(),
    "tp2": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "tp2-chunks": dict(tensor_model_parallel_size=2, sequence_parallel=True),
    "pp2": dict(pipeline_model_parallel_size=2),
    "cp2": dict(context_parallel_size=2),
    "ep2": dict(expert_model_parallel_size=2),
    "packed": dict(),
    "packed-tp2-cp2": dict(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2),
}


# 3 of the 16 rows of a rank, and a last chunk of one
CHUNKS = (
    "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1 --lightning-recompute-chunk 12"
)


def run(case: Case, args, layout: dict) -> tuple[float, float]:
    """The largest error of states and logits, and of gradients, on this rank."""
    config, weight, tokens = case["config"], case["weight"], case["tokens"]
    whole = released.to_megatron(config, args, case["tensors"])
    with contextlib.redirect_stdout(io.StringIO()):
        model = released.build(args, **layout)
    released.load(model, whole)
    groups = {name: getattr(parallel_state, f"get_{name}")() for name in (
        "tensor_model_parallel_group", "context_parallel_group", "pipeline_model_parallel_group", "data_parallel_group",
    )}  # fmt: skip
    tp, cp, pp, dp = groups.values()
    rows = slice(dp.rank(), dp.rank() + 1) if dp.size() > 1 else slice(None)
    packed = None
    if case["packed"]:
        bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
        packed = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH)
    mine = tokens_of(cp.rank(), cp.size(), "zigzag", [LENGTH // cp.size()] * cp.size(), packed and packed.cu_seqlens_q)
    here = layers.tokens_here(mine, tp.rank(), tp.size()) if layout.get("sequence_parallel") else mine
    tokens, weight = tokens[rows, mine], weight[rows][:, mine]

    stage, received = pp.rank(), None
    if stage > 0:
        received = torch.empty(LENGTH, tokens.shape[0], args.hidden_size)
        dist.recv(received, group=pp, group_src=stage - 1)
        model.set_input_tensor(received.requires_grad_())
    places, mask = torch.arange(LENGTH)[None, mine], case["mask"][rows][:, mine]
    forward = lambda: model(tokens, places, None, packed_seq_params=packed, loss_mask=mask)
    MTPLossLoggingHelper.tracker.clear()
    states, output = released.hidden_states(model, forward)
    if stage < pp.size() - 1:
        dist.send(output.detach(), group=pp, group_dst=stage + 1)
        gradient = torch.empty_like(output)
        dist.recv(gradient, group=pp, group_src=stage + 1)
        output.backward(gradient)
    else:
        vocabulary = slice(tp.rank() * output.shape[-1], (tp.rank() + 1) * output.shape[-1])
        logits = torch.nn.functional.pad(
            case["logits"][rows][:, mine], (0, args.padded_vocab_size - config["vocab_size"])
        )
        weights = torch.nn.functional.pad(weight, (0, args.padded_vocab_size - config["vocab_size"]))
        states[-1], wanted = output.detach().transpose(0, 1), logits[..., vocabulary].transpose(0, 1)
        (output * weights[..., vocabulary]).sum().backward()
        if received is not None:
            dist.send(received.grad, group=pp, group_dst=stage - 1)
    errors = [
        difference(found, wanted if number == -1 else case["states"][number][rows][:, here].transpose(0, 1))
        for number, found in states.items()
    ]
    if args.mtp_num_layers and stage == pp.size() - 1:  # means over this rank's tokens
        losses = MTPLossLoggingHelper.tracker["loss_values"] * mask.sum()
        for group in (cp, dp):
            dist.all_reduce(losses, group=group)
        errors.append(difference(losses, torch.stack(case["losses"])))
    return max(errors), gradient_error(case, args, model, [*groups.values()])


def gradient_error(case: Case, args, model, groups: list) -> float:
    """Gradients, summed as Megatron's training sums them, against slices of the reference's."""
    tp, cp, pp, dp = groups
    nothing = {name: torch.zeros_like(x) for name, x in case["tensors"].items()}
    grads = {name: nothing[name] if x is None else x for name, x in case["grads"].items()}
    wanted = released.slices(model, released.to_megatron(case["config"], args, grads))
    worst = 0.0
    for name, parameter in model.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(grad, group=tp)
        dist.all_reduce(grad, group=cp)
        if args.mtp_num_layers and "word_embeddings" in name:  # the stage with multi-token prediction has them, too
            dist.all_reduce(grad, group=pp)
        if getattr(parameter, "allreduce", True):
            dist.all_reduce(grad, group=dp)
        worst = max(worst, difference(grad, wanted[name]))
    return worst


def check(rank: int, world: int, name: str, file: Path) -> list[str]:
    layout, lines = LAYOUTS[name], []
    sizes = {short: layout.get(f"{long}_parallel_size", 1) for short, long in (
        ("tp", "tensor_model"), ("pp", "pipeline_model"), ("cp", "context"),
    )}  # fmt: skip
    layers.start(**sizes, **({"ep": 2} if name == "ep2" else {}))
    exchanges = mock.patch("lightning_megatron.layer.interleave", wraps=interleave).start()
    for case in torch.load(file):
        if name == "pp2" and case["config"].get("tie_word_embeddings"):
            continue  # the last stage's copy of the embedding is Megatron's business, and the first case has none
        if name == "ep2" and not {"num_experts", "num_local_experts"} & case["config"].keys():
            continue
        args = released.args_of(case["config"], f"{MEGATRON} {CHUNKS}" if name == "tp2-chunks" else MEGATRON)
        if name == "pp2":
            layout["decoder_first_pipeline_num_layers"] = args.num_layers // 2
        states, grads = run(case, args, layout)
        lines.append(f"{case['kind']} seed {case['seed']}: states {states:.1e}, gradients {grads:.1e}")
        assert states <= STATES and grads <= GRADS, f"{lines[-1]}\n{case['config']}"
    assert bool(exchanges.call_count) == (name == "tp2-chunks"), "whole layers went through chunks"
    return lines


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_the_reference(name, cases):
    world = {"one": 1, "packed": 1, "packed-tp2-cp2": 4}.get(name, 2)
    for lines in spawn(check, world, name, cases[name.startswith("packed")], timeout=300):
        print("\n".join(lines))
        assert lines
