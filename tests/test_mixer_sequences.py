"""Packed documents, generation token by token, and what dtype and layout must not change: decays and checkpoints."""

from __future__ import annotations

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module

from tests import layers
from tests.helpers.variants import VARIANTS
from tests.launch import spawn
from tests.layers import Variant, assert_close, decay_of, error, reference
from tests.tolerances import LAYERS as TOLERANCE

DOCUMENTS = (7, 1, 0, 20, 12)
LENGTH = sum(DOCUMENTS)


# ---- packed documents ------------------------------------------------------------------------------------------------


def check_packed(
    rank: int, world: int, variant: Variant, sp: bool, seed: int, padded: bool, rotary_length: int
) -> None:
    """Documents in one sequence against the documents one by one."""
    layers.start(tp=world)
    rng = torch.Generator().manual_seed(seed)
    mixer = layers.build_mixer(variant, **layers.layout(world, sp))
    whole = layers.draw_parameters(mixer, world, rng)
    layers.set_parameters(mixer, whole, rank, world)
    x, weight = (torch.randn(LENGTH, 1, 64, generator=rng) for _ in range(2))

    def judge(p, x):
        return torch.cat([reference(variant, p, document)[0] for document in x.split(DOCUMENTS) if len(document)])

    want = layers.with_gradients(judge, whole, x, weight.double())
    want = {name: layers.slice_of(name, y, rank, world) for name, y in want.items()}
    if sp:
        want |= {name: layers.tokens_here(want[name], rank, world) for name in ("output", "d input")}
        x, weight = (layers.tokens_here(y, rank, world) for y in (x, weight))
    bounds = torch.tensor([0, *DOCUMENTS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    real = bounds - torch.arange(len(bounds), dtype=torch.int32).clamp(max=1) if padded else bounds
    packed = PackedSeqParams(
        "thd", real, real, bounds if padded else None, bounds if padded else None, max(DOCUMENTS), max(DOCUMENTS)
    )
    model = layers.trainable(mixer, mixer.config)
    x = x.clone().requires_grad_()
    output, _ = model(x, None, rotary_pos_emb=layers.rotary(variant, rotary_length), packed_seq_params=packed)
    output.backward(weight)
    got = {"output": output, "d input": x.grad}
    got |= {f"d {name}": g for name, g in layers.reduce_gradients(model).items()}
    assert_close(got, want, TOLERANCE[torch.float32])


PACKED = Variant(VARIANTS["everything"].options, layer=3, rotary_percent=0.5)


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("rotary_length", [LENGTH, max(DOCUMENTS), 64])  # Megatron rotates the first kind with offsets
def test_packed_equals_documents_one_by_one(rotary_length, padded, rng):
    spawn(check_packed, 1, PACKED, False, rng.initial_seed(), padded, rotary_length)


@pytest.mark.parametrize("sp", [False, True], ids=["tp2", "tp2-sp"])
def test_packed_over_ranks(sp, rng):
    spawn(check_packed, 2, PACKED, sp, rng.initial_seed(), False, LENGTH)


# ---- generation ------------------------------------------------------------------------------------------------------


def check_decoding(rank: int, world: int, variant: Variant, seed: int) -> None:
    """A prompt in two pieces, then token by token, against the whole sequence at once; then the next prompt."""
    layers.start(tp=world)
    rng = torch.Generator().manual_seed(seed)
    mixer = layers.build_mixer(variant, **layers.layout(world, False)).eval()
    dtype = mixer.config.params_dtype
    whole = layers.draw_parameters(mixer, world, rng)
    layers.set_parameters(mixer, whole, rank, world)
    x = torch.randn(LENGTH, 2, 64, generator=rng).to(dtype)
    context = StaticInferenceContext(max_batch_size=2, max_sequence_length=LENGTH)
    freqs = layers.rotary(variant, LENGTH)

    @torch.inference_mode()
    def read(tokens):
        output, _ = mixer(tokens, None, inference_context=context, rotary_pos_emb=freqs)
        context.sequence_len_offset += len(tokens)
        state = context.key_value_memory_dict[variant.layer][0][0]
        assert state.dtype == torch.float32 and state.shape == (
            2,
            4 // world,
            mixer.shape.key_dim,
            mixer.shape.value_dim,
        )
        return output, state

    outputs, states = zip(*(read(tokens) for tokens in x.split([17, 6] + [1] * (LENGTH - 23))), strict=True)
    want, want_state = reference(variant, whole, x.double())
    tolerance = TOLERANCE[dtype]
    assert_close({"output": torch.cat(outputs)}, {"output": want}, tolerance)
    assert error(states[-1].flatten(0, 1), want_state.chunk(world, 1)[rank].flatten(0, 1)) < tolerance

    context.reset()
    output, state = read(x[:17])
    assert torch.equal(output, outputs[0]) and torch.equal(state, states[0])


DECODED = {
    "defaults": Variant(),
    "everything": PACKED,
    "bf16": PACKED.replace(config=dict(params_dtype=torch.bfloat16, bf16=True)),
}


@pytest.mark.parametrize("variant", DECODED.values(), ids=DECODED.keys())
def test_decoding_equals_whole_sequence(variant, rng):
    spawn(check_decoding, 1, variant, rng.initial_seed())


@torch.inference_mode()
def build_and_run(rank: int, world: int) -> None:
    layers.start()
    mixer = layers.build_mixer(Variant())
    mixer(torch.randn(LENGTH, 2, 64), None)


def test_model_built_in_inference_mode():
    spawn(build_and_run, 1)


def test_decoding_over_ranks(rng):
    spawn(check_decoding, 2, PACKED, rng.initial_seed())


# ---- decays ----------------------------------------------------------------------------------------------------------


def check_decays(rank: int, world: int, options: dict) -> None:
    layers.start(tp=world)
    for layer in (1, 2, 3, 4):
        variant = Variant(options, dict(params_dtype=torch.bfloat16, bf16=True), layer=layer)
        mixer = layers.build_mixer(variant, **layers.layout(world, False))
        want = decay_of(variant.values, 4, layer, 4).float().chunk(world)[rank]
        wrapped = Float16Module(mixer.config, layers.build_mixer(variant, **layers.layout(world, False))).module
        for converted in (
            mixer,
            mixer.bfloat16(),
            mixer.half(),
            mixer.float(),
            mixer.to("cpu", torch.bfloat16),
            wrapped,
        ):
            assert converted.log_decay.dtype == torch.float32 and torch.equal(converted.log_decay, want)
        assert wrapped.linear_qkv.weight.dtype == torch.bfloat16  # or the wrapping would prove nothing


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(decay="minimax"),
        dict(decay="bailing", decay_offset=1),
        dict(decay="tnl", decay_offset=-1),
        dict(decay="paper"),
    ],
    ids=str,
)
def test_decay_is_exact_for_layer_and_rank_in_any_dtype(options, world):
    spawn(check_decays, world, options)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def state_dicts(rank: int, world: int, variant: Variant) -> tuple[dict, dict]:
    """Names with shapes of state_dict(), and with (global shape, offset, replica) of sharded_state_dict()."""
    layers.start(tp=world)
    mixer = layers.build_mixer(variant, **layers.layout(world, False))
    plain = {name: list(x.shape) for name, x in mixer.state_dict().items() if x is not None}
    sharded = mixer.sharded_state_dict("attention.")
    return plain, {
        name: (list(x.global_shape), list(x.global_offset), x.replica_id)
        for name, x in sharded.items()
        if isinstance(x, ShardedTensor)
    }


def test_state_dict_holds_parameters_and_no_decay():
    ((plain, _),) = spawn(state_dicts, 1, VARIANTS["everything"])
    assert plain == {
        "linear_qkv.weight": [2 * (2 * 16 + 2 * 48 + 16 + 48), 64],
        "linear_qkv.bias": [2 * (2 * 16 + 2 * 48 + 16 + 48)],
        "q_norm.weight": [16],
        "k_norm.weight": [16],
        "out_norm.weight": [4 * 48],
        "linear_proj.weight": [64, 4 * 48],
        "linear_proj.bias": [64],
    }


def test_sharded_state_dict_names_slices_of_the_whole():
    ((plain, _),) = spawn(state_dicts, 1, VARIANTS["everything"])
    for rank, (_, sharded) in enumerate(spawn(state_dicts, 2, VARIANTS["everything"])):
        assert sharded.keys() == {f"attention.{name}" for name in plain}
        for name, shape in plain.items():
            dim, offset = layers.sliced_dim(name), [0] * len(shape)
            if dim is not None:
                offset[dim] = rank * shape[dim] // 2
            global_shape, global_offset, replica = sharded[f"attention.{name}"]
            assert (global_shape, global_offset) == (shape, offset), name
            assert replica == (0, 0 if dim is not None else rank, 0), name  # only one rank writes what all hold
