"""Lightning layers of multi-token prediction, in whole models: losses and every gradient against formulas in fp64."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from lightning_megatron.config import LightningOptions
from lightning_megatron.layer_log import StateSums, lightning_layers
from lightning_megatron.mixer import LightningAttention
from lightning_megatron.runtime import prepare, refuse
from lightning_megatron.softmax import LatentAttention
from lightning_megatron.spec import get_hybrid_block_spec, get_mtp_block_spec
from tests import layers
from tests.helpers.context_parallel import tokens_of
from tests.helpers.model_cases import DOCUMENTS, LENGTH, loss_mask
from tests.launch import spawn
from tests.layers import Variant, reference, rms, transformer_config

LAYERS, VOCABULARY, TOLERANCE = 2, 64, 2e-5
OPTIONS = dict(
    mtp_attention="lightning",
    decay="paper",
    rope=True,
    qk_norm=True,
    norm_eps=1.0,
    attn_alpha=0.7,
    attn_beta=1.5,
    mlp_beta=0.6,
)
CONFIG = dict(
    num_layers=LAYERS, activation_func=F.silu, calculate_per_token_loss=True, mtp_loss_scaling_factor=2.0,
)  # fmt: skip
FULL = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
SELECTIVE = dict(recompute_granularity="selective", recompute_modules=["core_attn"])
TP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True)
PP2 = dict(pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
CP2 = dict(context_parallel_size=2)
PLAIN = OPTIONS | dict(rope=False)
Tensors = dict[str, torch.Tensor]
# how ranks share the sequence -> (fields of the config, layers of multi-token prediction, packed documents, options)
LAYOUTS = {
    "zigzag": [
        ({}, 1, False, OPTIONS), ({}, 2, True, OPTIONS), (TP2, 1, False, OPTIONS), (TP2 | FULL, 2, True, OPTIONS),
        (PP2, 1, False, OPTIONS), (PP2, 2, True, OPTIONS), (CP2 | SELECTIVE, 1, False, OPTIONS),
        (CP2 | FULL, 2, True, OPTIONS),
    ],
    # GPTModel cuts angles as zigzag has them, except of packed documents
    "contiguous": [(CP2 | FULL, 1, False, PLAIN), (CP2, 2, True, OPTIONS)],
}  # fmt: skip


# ---- the judge -------------------------------------------------------------------------------------------------------


def sub(p: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): x for name, x in p.items() if name.startswith(prefix)}


def layer(p: Tensors, x: torch.Tensor, number: int, given: dict) -> torch.Tensor:
    """A lightning layer ``[s, b, h]`` with the decay of layer ``number``, from 1."""
    options, variant = LightningOptions(**given), Variant(given, CONFIG, number)
    norm = lambda name, x: rms(x, transformer_config().layernorm_epsilon) * p[f"{name}.weight"]
    y, _ = reference(variant, sub(p, "self_attention."), norm("input_layernorm", x))
    x = options.attn_alpha * x + options.attn_beta * y
    y = F.silu(norm("pre_mlp_layernorm", x) @ p["mlp.linear_fc1.weight"].T) @ p["mlp.linear_fc2.weight"].T
    return x + options.mlp_beta * y


def document_losses(p: Tensors, given: dict, ahead: int, tokens, labels, mask) -> list[torch.Tensor]:
    """Sums over a document ``[b, s]``: of the model, and of its layers of multi-token prediction."""
    norm = lambda name, x: rms(x, transformer_config().layernorm_epsilon) * p[f"{name}.weight"]
    embed = lambda tokens: p["embedding.word_embeddings.weight"][tokens.T]
    later = lambda x, places: F.pad(x[:, places:], (0, min(places, x.shape[1])))
    x, losses = embed(tokens), []
    for number in range(LAYERS):
        x = layer(sub(p, f"decoder.layers.{number}."), x, number + 1, given)
    x = norm("decoder.final_layernorm", x)
    for places in range(ahead + 1):
        if places:
            name = f"mtp.layers.{places - 1}."
            joined = torch.cat((norm(f"{name}enorm", embed(later(tokens, places))), norm(f"{name}hnorm", x)), -1)
            x = layer(sub(p, f"{name}mtp_model_layer."), joined @ p[f"{name}eh_proj.weight"].T, LAYERS, given)
            x = norm(f"{name}final_layernorm", x)
        logits = x @ p["output_layer.weight"].T
        each = F.cross_entropy(logits.permute(1, 2, 0), later(labels, places), reduction="none")
        losses.append((later(mask, places) * each).sum())
    return losses


def results(p: Tensors, given: dict, ahead: int, packed: bool, tokens, labels, mask) -> tuple[torch.Tensor, Tensors]:
    """Losses ``[1 + ahead]``, and the gradients of what is trained, in fp64."""
    p = {name: x.double().requires_grad_() for name, x in p.items()}
    bounds = DOCUMENTS if packed else [0, LENGTH]
    parts = [
        document_losses(p, given, ahead, tokens[:, a:b], labels[:, a:b], mask[:, a:b].double())
        for a, b in zip(bounds, bounds[1:], strict=False)
    ]
    losses = torch.stack([torch.stack(part) for part in parts]).sum(0)
    (losses[0] + CONFIG["mtp_loss_scaling_factor"] / ahead * losses[1:].sum()).backward()
    return losses.detach(), {name: x.grad for name, x in p.items()}


# ---- Megatron's layers -----------------------------------------------------------------------------------------------


def build(config, options: LightningOptions, layout: str) -> GPTModel:
    pp = parallel_state.get_pipeline_model_parallel_group()
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(config, options, layout=layout)
    return GPTModel(
        config, get_hybrid_block_spec(config, options, layout=layout), vocab_size=VOCABULARY,
        max_sequence_length=LENGTH, pre_process=pp.rank() == 0, post_process=pp.rank() == pp.size() - 1,
        share_embeddings_and_output_weights=False, position_embedding_type="rope",
        mtp_block_spec=get_mtp_block_spec(config, options, layout=layout),
    )  # fmt: skip


def whole_name(name: str, stage: int) -> str:
    """Of a parameter, in a model of one stage; here each has one layer."""
    return name.replace("decoder.layers.0.", f"decoder.layers.{stage}.")


def part(name: str, whole: torch.Tensor, tp) -> torch.Tensor:
    rows = name.endswith(("eh_proj.weight", "word_embeddings.weight", "output_layer.weight"))
    return whole.chunk(tp.size())[tp.rank()] if rows else layers.slice_of(name, whole, tp.rank(), tp.size())


def draw(ahead: int, packed: bool, rng: torch.Generator) -> tuple[Tensors, list[torch.Tensor]]:
    """Weights of the whole model, and tokens, labels and loss mask ``[b, s]``."""
    config = transformer_config(**CONFIG, mtp_num_layers=ahead)
    with torch.random.fork_rng():
        model = build(config, LightningOptions(**OPTIONS), "zigzag")
    whole = {}
    for name, x in sorted(model.named_parameters()):
        y = torch.randn(x.shape, generator=rng)
        whole[name] = 1 + 0.3 * y if "norm" in name else y * x.shape[-1] ** -0.5
    shape = (1 if packed else 2, LENGTH)
    tokens, labels = (torch.randint(VOCABULARY, shape, generator=rng) for _ in range(2))
    return whole, [tokens, labels, loss_mask(shape, packed, ahead)]


def trained(model: GPTModel, batch: list, packed: PackedSeqParams | None, mine) -> torch.Tensor:
    """Losses ``[1 + ahead]`` of this rank's tokens on the last stage, else 0; parameters have their gradients."""
    pp, config = parallel_state.get_pipeline_model_parallel_group(), model.config
    tokens, labels, mask = (x[:, mine] for x in batch)
    stage, received = pp.rank(), None
    if stage > 0:
        received = torch.empty(LENGTH, tokens.shape[0], config.hidden_size)
        dist.recv(received, group=pp, group_src=stage - 1)
        model.set_input_tensor(received.requires_grad_())
    MTPLossLoggingHelper.tracker.clear()
    places = torch.arange(LENGTH)[None, mine]
    output = model(tokens, places, None, labels=labels, packed_seq_params=packed, loss_mask=mask)
    if stage < pp.size() - 1:
        dist.send(output.detach(), group=pp, group_dst=stage + 1)
        gradient = torch.empty_like(output)
        dist.recv(gradient, group=pp, group_src=stage + 1)
        output.backward(gradient)
        return torch.zeros(1 + config.mtp_num_layers)
    loss = (output * mask).sum()
    loss.backward()
    if received is not None:
        dist.send(received.grad, group=pp, group_dst=stage - 1)
    return torch.cat((loss.detach()[None], MTPLossLoggingHelper.tracker["loss_values"] * mask.sum()))


def error(whole: Tensors, batch: list, wanted: tuple, layout: str, sizes: dict, packed: bool, given: dict) -> float:
    """The largest relative error of losses and gradients on this rank, of those that are ``wanted``."""
    layers.start(
        tp=sizes.get("tensor_model_parallel_size", 1), pp=sizes.get("pipeline_model_parallel_size", 1),
        cp=sizes.get("context_parallel_size", 1),
    )  # fmt: skip
    names = ("tensor_model_parallel", "context_parallel", "pipeline_model_parallel")
    tp, cp, pp = (getattr(parallel_state, f"get_{name}_group")() for name in names)
    config = transformer_config(**CONFIG | sizes, mtp_num_layers=len(wanted[0]) - 1)
    model = build(config, LightningOptions(**given), layout)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(part(name, whole[whole_name(name, pp.rank())], tp))
    bounds = torch.tensor(DOCUMENTS, dtype=torch.int32)
    documents = PackedSeqParams("thd", bounds, bounds, max_seqlen_q=LENGTH, max_seqlen_kv=LENGTH) if packed else None
    mine = tokens_of(cp.rank(), cp.size(), layout, [LENGTH // cp.size()] * cp.size(), bounds)
    losses = trained(model, batch, documents, mine)
    for group in (cp, pp):
        dist.all_reduce(losses, group=group)
    errors = [difference(losses, wanted[0])]
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=tp)
        dist.all_reduce(gradient, group=cp)
        if "word_embeddings" in name:  # the stage with multi-token prediction has them, too
            dist.all_reduce(gradient, group=pp)
        errors.append(difference(gradient, part(name, wanted[1][whole_name(name, pp.rank())], tp)))
    parallel_state.destroy_model_parallel()
    return max(errors)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float((found.double() - wanted).norm() / wanted.norm())


def check(rank: int, world: int, layout: str, seed: int) -> list[str]:
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    drawn = {case: draw(*case, rng) for case in ((1, False), (2, True))}
    parallel_state.destroy_model_parallel()
    wanted, lines = {}, []
    for sizes, ahead, packed, given in LAYOUTS[layout]:
        whole, batch = drawn[ahead, packed]
        if (ahead, packed) not in wanted:  # with the same options in all layouts here
            wanted[ahead, packed] = results(whole, given, ahead, packed, *batch)
        found = error(whole, batch, wanted[ahead, packed], layout, sizes, packed, given)
        lines.append(f"{sizes}, {ahead} layers, packed {packed}: {found:.1e}")
        assert found < TOLERANCE, lines
    return lines


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients(layout, rng):
    for lines in spawn(check, 2, layout, rng.initial_seed(), timeout=300):
        print("\n".join(lines))


# ---- their place in the model ----------------------------------------------------------------------------------------


def check_places(rank: int, world: int) -> None:
    layers.start()
    options = LightningOptions(**OPTIONS)
    for pattern, indices in (([1, 0], [0, 2, 3]), ([0, 0], [2, 3])):
        config = transformer_config(**CONFIG, linear_attention_freq=pattern, mtp_num_layers=2)
        model = build(config, options, "zigzag")
        for module in model.modules():
            if isinstance(module, LightningAttention):
                module.state_sums = StateSums()
        found = list(lightning_layers([model], LAYERS))
        assert [index for *_, index in found] == indices
        for _, mixer, index in found:
            wanted = layers.decay_of(options, config.num_attention_heads, min(index + 1, LAYERS), LAYERS)
            assert torch.allclose(mixer.log_decay.double(), wanted, rtol=1e-6)
    latent = layers.latent_config(**CONFIG, linear_attention_freq=[1, 0], mtp_num_layers=1)
    model = build(latent, options, "zigzag")
    kinds = [type(x.self_attention) for x in (*model.decoder.layers, model.mtp.layers[0].mtp_model_layer)]
    assert kinds == [LightningAttention, LatentAttention, LightningAttention]
    contiguous = dict(CONFIG, context_parallel_size=2, mtp_num_layers=1)
    with pytest.raises(ValueError, match="contiguous.* with --mtp-num-layers add --lightning-mtp-attention lightning"):
        refuse(transformer_config(**contiguous), LightningOptions(), "contiguous")
    config = transformer_config(**contiguous)
    refuse(config, options, "contiguous")
    config.mtp_hsm = True  # a field in megatron-core 0.20
    with pytest.raises(ValueError, match="--mtp-hsm moves hidden states as layout='zigzag' has them; use that"):
        refuse(config, options, "contiguous")
    with pytest.raises(ValueError, match="mtp-attention lightning .*; add --mtp-num-layers, or give softmax"):
        refuse(transformer_config(**CONFIG), options, "zigzag")


def test_places():
    """Decays, numbers in the log, a model with no other lightning layer, multi-latent attention, and refusals."""
    spawn(check_places, 1)
