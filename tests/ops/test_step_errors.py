"""All that a user of lightning_step and lightning_decode can get wrong: what was given, and the remedy."""

import pytest
import torch

from lightning_megatron.ops import lightning_decode, lightning_step


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


def step_arguments(**changes) -> dict:
    """R = 2, S = 3, H = 4, Hkv = 2, K = 16, V = 32, N = 5, with changes."""
    return dict(
        q=zeros(2, 3, 4, 16), k=zeros(2, 3, 2, 16), v=zeros(2, 3, 2, 32), log_decay=torch.full((4,), -0.1),
        states=zeros(5, 4, 16, 32), slots=torch.tensor([3, 0]),
    ) | changes  # fmt: skip


def decode_arguments(**changes) -> dict:
    """R = 2, H = 4, Hkv = 2, K = 16, V = 32 with a gate, N = 5, with changes."""
    good = step_arguments(mixed=zeros(2, 2 * 144), group_dims=(32, 64, 16, 32))
    return {name: x for name, x in good.items() if name not in "qkv"} | changes


def turned(angles: torch.Tensor, positions: torch.Tensor | None = None) -> dict:
    return dict(angles=angles, positions=torch.tensor([3, 0]) if positions is None else positions)


WRONG_STEPS = {
    "q as a list": (dict(q=[1.0]), ["q must be a torch.Tensor", "list"]),
    "no slots": (dict(slots=None), ["slots must be a torch.Tensor", "NoneType"]),
    "three dimensions": (dict(q=zeros(2, 4, 16)), ["[2, 4, 16]", "[R,S,H,K]"]),
    "k of other tokens": (dict(k=zeros(2, 2, 2, 16)), ["[2, 2, 2, 16]", "is [R,S,H,K]", "[2,3,Hkv,16]"]),
    "no token": ({n: x[:, :0] for n, x in step_arguments().items() if n in "qkv"}, ["S = 0", "1 to 16"]),
    "17 tokens": (
        dict(q=zeros(2, 17, 4, 16), k=zeros(2, 17, 2, 16), v=zeros(2, 17, 2, 32)), ["S = 17", "lightning_attn"],
    ),
    "a gradient": (dict(q=zeros(2, 3, 4, 16, requires_grad=True)), ["requires grad", "no_grad"]),
    "states of kv heads": (dict(states=zeros(5, 2, 16, 32)), ["[5, 2, 16, 32]", "H,K,V = 4,16,32"]),
    "states in half": (dict(states=zeros(5, 4, 16, 32).half()), ["torch.float16", "must be torch.float32"]),
    "states elsewhere": (dict(states=zeros(5, 4, 16, 32, device="meta")), ["on meta", "on cpu"]),
    "states transposed": (dict(states=zeros(5, 4, 32, 16).mT), ["strides", "contiguous"]),
    "one state for all": (dict(states=zeros(1, 4, 16, 32).expand(5, 4, 16, 32)), ["overlap", "in place"]),
    "slots of floats": (dict(slots=zeros(2)), ["torch.float32", "int32 or int64"]),
    "three slots": (dict(slots=torch.tensor([0, 1, 2])), ["[3]", "must be [2]"]),
    "slot past states": (dict(slots=torch.tensor([0, 5])), ["slot 5", "5 rows", "-1"]),
    "slot -2": (dict(slots=torch.tensor([-2, 1])), ["slot -2", "padding"]),
    "the same slot": (dict(slots=torch.tensor([1, 1])), ["[1, 1]", "twice"]),
    "a slope": (dict(log_decay=torch.full((4,), 0.1)), ["log_decay[0] = 0.1", "<= 0"]),
    "intermediate of few tokens": (dict(intermediate=zeros(5, 2, 4, 16, 32)), ["S >= 3", "[5, 2, 4, 16, 32]"]),
    "intermediate of other rows": (dict(intermediate=zeros(4, 3, 4, 16, 32)), ["N = 5", "[4, 3, 4, 16, 32]"]),
    "flat intermediate": (dict(intermediate=zeros(5, 4, 16, 32)), ["[N,S,H,K,V]", "[5, 4, 16, 32]"]),
    "unknown backend": (dict(backend="cuda"), ["backend='cuda'"]),
}  # fmt: skip
NORM = (torch.ones(16), 1e-6)
WRONG_DECODES = {
    "flat mixed": (dict(mixed=zeros(288)), ["[288]", "[R, Hkv * 144]"]),
    "mixed of part of a group": (dict(mixed=zeros(2, 280)), ["[2, 280]", "whole groups"]),
    "integers": (dict(mixed=zeros(2, 288, dtype=torch.int32)), ["torch.int32", "bfloat16"]),
    "group of three": (dict(group_dims=(32, 64, 16)), ["(32, 64, 16)", "q, gate, k and v"]),
    "gate of one head": (dict(group_dims=(32, 32, 16, 32)), ["32 columns of gate", "2 * 32"]),
    "K = 8": (dict(group_dims=(16, 64, 8, 32), mixed=zeros(2, 240)), ["K=8", "multiple of 16"]),
    "decay of kv heads": (dict(log_decay=zeros(2)), ["[2]", "must be [4]"]),
    "feature map": (dict(feature_map="relu"), ["'relu'", "silu-qkv"]),
    "gate": (dict(gate="tanh"), ["'tanh'", "sigmoid"]),
    "gate without columns": (
        dict(gate="linear", group_dims=(32, 0, 16, 32), mixed=zeros(2, 160)), ["'linear'", "gate='none'"],
    ),
    "norm without eps": (dict(q_norm=NORM[0]), ["q_norm", "(weight, eps)"]),
    "q norm of no weight": (dict(q_norm=(None, 1e-6)), ["weight of q_norm", "NoneType"]),
    "norm of kv channels": (dict(k_norm=(torch.ones(32), 1e-6)), ["weight of k_norm", "[16]", "[32]"]),
    "out norm of a head": (dict(out_norm=(torch.ones(32), 1e-6)), ["weight of out_norm", "[128]", "[32]"]),
    "angles alone": (dict(angles=zeros(9, 16)), ["angles and positions belong together"]),
    "wide angles": (turned(zeros(9, 18)), ["at most K = 16", "[9, 18]"]),
    "odd angles": (turned(zeros(9, 3)), ["n even", "[9, 3]"]),
    "angles of integers": (turned(zeros(9, 16).int()), ["torch.float32", "torch.int32"]),
    "angles in bf16": (turned(zeros(9, 16).bfloat16()), ["torch.float32", "torch.bfloat16"]),
    "positions of all": (turned(zeros(9, 16), torch.arange(9)), ["[2]", "[9]"]),
    "positions in fp32": (turned(zeros(9, 16), zeros(2)), ["int32 or int64", "torch.float32"]),
    "positions beyond": (turned(zeros(9, 16), torch.tensor([3, 9])), ["[3, 9]", "has 9"]),
    "half states": (dict(states=zeros(5, 4, 16, 32).half()), ["torch.float16"]),
    "slot past states": (dict(slots=torch.tensor([0, 5])), ["slot 5"]),
    "a gradient": (dict(mixed=zeros(2, 288, requires_grad=True)), ["requires grad"]),
}  # fmt: skip


@pytest.mark.parametrize(
    "operator, call, words",
    [(lightning_step, step_arguments(**call), words) for call, words in WRONG_STEPS.values()]
    + [(lightning_decode, decode_arguments(**call), words) for call, words in WRONG_DECODES.values()],
    ids=[*WRONG_STEPS, *(f"decode: {name}" for name in WRONG_DECODES)],
)
def test_wrong_call(operator, call, words):
    with pytest.raises(ValueError) as raised:
        operator(**call)
    text = str(raised.value)
    assert not [word for word in words if word not in text], text
    assert "\n" not in text and len(text) < 300


def test_good_calls():
    """What the wrong calls differ from is right."""
    assert lightning_step(**step_arguments()).shape == (2, 3, 4, 32)
    lightning_step(**step_arguments(intermediate=zeros(5, 4, 4, 16, 32)))
    angles, out = turned(zeros(9, 16)), (torch.ones(128), 1e-6)
    call = decode_arguments(q_norm=NORM, k_norm=NORM, out_norm=out, gate="linear", **angles)
    assert lightning_decode(**call).shape == (2, 128)
