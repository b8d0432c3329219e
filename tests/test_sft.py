"""``--sft``: over context-parallel ranks every document is cut by itself, with and without TransformerEngine."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_megatron.training.data import check_documents, documents_on_this_cp_rank
from tests import layers
from tests.helpers.training import LAYOUTS, MODELS, SIZE, TRAIN, assert_same_training
from tests.launch import run_pretrain, spawn

# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of a tokenizer of one token a word, and of packed conversations whose lengths divide by nothing."""
    pytest.importorskip("datasets", reason="Megatron's --sft reads its data with it")
    folder, draw = tmp_path_factory.mktemp("sft"), random.Random(5)
    words = ["<unk>", "<eos>", "<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_233>", "System", "User", "Assistant"]
    words += [f"w{i}" for i in range(240)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    wrapped.add_special_tokens({"additional_special_tokens": words[2:5]})
    wrapped.save_pretrained(folder / "tokenizer")

    def message(role: str, most: int) -> dict[str, str]:
        first = draw.randrange(200)
        return {"role": role, "content": " ".join(f"w{first + i}" for i in range(draw.randint(1, most)))}

    def conversation() -> list[dict[str, str]]:
        return [message("system", 4), message("user", 7), message("assistant", 11)]

    rows = [{"messages": sum((conversation() for _ in range(4)), [])} for _ in range(32)]
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return [
        *("--sft", "--tokenizer-type", "SFTTokenizer", "--tokenizer-model", folder / "tokenizer"),
        *("--data-path", path, "--split", "100,0,0"),
        # else Megatron divides on every rank by the tokens there that count, which prompts and padding leave unequal
        "--calculate-per-token-loss",
    ]


def train(model: str, layout: str, data: list):
    nproc, flags = LAYOUTS[layout]
    size = [*SIZE[: SIZE.index("--vocab-size")], *SIZE[SIZE.index("--vocab-size") + 2 :]]
    return run_pretrain([*size, *TRAIN, *MODELS[model].split(), *flags.split(), *data], nproc)


@pytest.mark.parametrize("model", ["all", "freq4"])
def test_context_parallel_ranks_train_as_one(model, data):
    """freq4 is a hybrid with rope: its softmax layer keeps documents apart, too."""
    one = train(model, "one", data)
    assert one.losses[-1] < one.losses[0] - 0.05
    # Adam makes rounding of almost zero gradients larger: 9e-6 after six steps; tokens in wrong places are off by 2e-2
    assert_same_training(train(model, "cp2", data), one, losses=5e-5, norms=1e-2)


# ---- the partition -----------------------------------------------------------------------------------------------


def parts(rank: int, world: int, bounds: list[int]) -> dict:
    layers.start(cp=world)
    tokens = torch.arange(bounds[-1])[None]
    whole = dict(tokens=tokens, labels=tokens + 1, loss_mask=tokens / 2, position_ids=None)
    bounds = torch.tensor([bounds], dtype=torch.int32)
    group = layers.parallel_state.get_context_parallel_group()
    return documents_on_this_cp_rank(
        whole | dict(cu_seqlens=bounds, cu_seqlens_padded=None, max_seqlen=bounds[0, :1]), group
    )


@pytest.mark.parametrize("world, bounds", [(2, [0, 4, 12, 12, 16]), (3, [0, 12, 18])])
def test_every_rank_gets_two_chunks_of_every_document(world, bounds):
    for rank, part in enumerate(spawn(parts, world, bounds)):
        want = []
        for start, end in zip(bounds, bounds[1:], strict=False):
            chunks = torch.arange(start, end).chunk(2 * world) if end > start else []
            want += [chunks[i] for i in (rank, 2 * world - 1 - rank) if chunks]
        want = torch.cat(want)[None]
        assert torch.equal(part["tokens"], want) and torch.equal(part["labels"], want + 1)
        assert torch.equal(part["loss_mask"], want / 2) and part["position_ids"] is None
        assert part["cu_seqlens"].tolist() == [bounds]


def test_documents_that_do_not_divide_are_refused():
    bounds = torch.tensor([[0, 4, 16, 16], [0, 6, 12, 16]], dtype=torch.int32)
    check_documents(bounds, 1)
    check_documents(bounds[:1], 2)
    message = (
        "--context-parallel-size 2 cuts every document of --sft into 4 equal chunks, .* at token 6; pad documents to a"
    )
    with pytest.raises(ValueError, match=message):
        check_documents(bounds, 2)
