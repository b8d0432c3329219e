"""Attention masks in inference: right padding and causal masks change nothing, left padding is refused."""

import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import get_attention_mask

from tests import layers
from tests.launch import spawn
from tests.layers import Variant

LENGTH, SHORT = 12, 7  # of the first and of the second prompt


def padded(left: bool, hidden_rows: str) -> torch.Tensor:
    """Megatron's mask [2, 1, LENGTH, LENGTH], true where hidden; padding sees the prompt, nothing or itself."""
    pad = torch.zeros(2, LENGTH, dtype=torch.bool)
    pad[1, : LENGTH - SHORT] = left
    pad[1, SHORT:] |= not left
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) | pad[:, None, None, :]
    if hidden_rows != "prompt":
        mask = mask | pad[:, None, :, None]
    if hidden_rows == "itself":
        mask = mask & ~(torch.eye(LENGTH, dtype=torch.bool) & pad[:, None, :, None])
    return mask


KINDS = ("prompt", "nothing", "itself")


def check(rank: int, world: int, seed: int) -> None:
    layers.start()
    rng = torch.Generator().manual_seed(seed)
    mixer = layers.build_mixer(Variant()).eval()
    layers.set_parameters(mixer, layers.draw_parameters(mixer, 1, rng), 0, 1)
    x = torch.randn(LENGTH, 2, 64, generator=rng)

    @torch.inference_mode()
    def read(mask, x=x, pieces=(LENGTH,)):
        context, outputs = StaticInferenceContext(max_batch_size=2, max_sequence_length=LENGTH), []
        for piece in x.split(pieces):
            start, end = context.sequence_len_offset, context.sequence_len_offset + len(piece)
            window = None if mask is None else mask[..., start:end, :end]  # as GPTInferenceWrapper cuts it
            outputs.append(mixer(piece, window, inference_context=context)[0])
            context.sequence_len_offset = end
        return torch.cat(outputs)

    want = read(None)
    alone = read(None, x[:SHORT, 1:], SHORT)
    torch.testing.assert_close(want[:SHORT, 1:], alone)
    right = [padded(False, kind) for kind in KINDS]
    keys = torch.zeros(2, 1, 1, LENGTH, dtype=torch.bool)
    keys[1, ..., SHORT:] = True
    empty = padded(False, "prompt")
    empty[0] = True  # a row that only fills the batch up to the size of a CUDA graph
    for mask in (get_attention_mask(LENGTH), *right, empty, keys, keys.float(), torch.zeros(1, 1, LENGTH, LENGTH)):
        assert torch.equal(read(mask), want)
    for pieces in ((5, 7), (9, 3), (6, 1, 1, 1, 1, 1, 1)):
        for mask in (get_attention_mask(LENGTH), *right):
            assert torch.equal(read(mask, pieces=pieces), read(None, pieces=pieces))

    documents = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    for part in (slice(0, 5), slice(5, LENGTH)):
        documents[..., part, part] = False
    documents |= get_attention_mask(LENGTH)
    for mask in (*(padded(True, kind) for kind in KINDS), keys.flip(-1), documents):
        with pytest.raises(ValueError, match="left-padded prompts .*equal length, or generate for one at a time"):
            read(mask)
        mixer(x, mask)  # training: softmax layers do not read it either (runtime.refuse_args)
    with pytest.raises(ValueError, match="left-padded"):  # one real token in the second piece only
        read(padded(True, "itself"), pieces=(4, 8))

    def generate(mask, step, rows=2):
        """A padded prompt, and one token."""
        context = StaticInferenceContext(max_batch_size=2, max_sequence_length=LENGTH + 2)
        mixer(x[:, :rows], mask, inference_context=context)
        context.sequence_len_offset = LENGTH
        return mixer(x[:1, :rows], step, inference_context=context)[0]

    with torch.no_grad():
        causal, unknown = torch.zeros(1, 1, 1, LENGTH + 1, dtype=torch.bool), "without a mask that still marks"
        filler = get_attention_mask(LENGTH).repeat(2, 1, 1, 1)
        filler[0] = True  # a row without any token holds nothing that matters
        filled = generate(filler, None)
        assert torch.equal(filled[:, 1:], generate(None, None)[:, 1:])
        for mask in (*right, keys):
            new = torch.cat((mask[..., -1:, :], torch.zeros(2, 1, 1, 1, dtype=torch.bool)), -1)
            new[1, ..., :SHORT] = False
            new[1, ..., SHORT:LENGTH] = True  # what a token after the padding would have to see
            for step, message in ((None, unknown), (causal, unknown), (new, "hides earlier tokens")):
                with pytest.raises(ValueError, match=message):
                    generate(mask, step)
            new[1] = True  # the second row has ended
            assert torch.equal(generate(mask, new)[:, :1], generate(None, None)[:, :1])
    gap = keys.clone()
    gap[1, ..., -1] = False  # one mask for all queries, in which padding lies between tokens
    with pytest.raises(ValueError, match="hides earlier tokens"):
        read(gap)


def test_masks_in_inference(rng):
    spawn(check, 1, rng.initial_seed())
