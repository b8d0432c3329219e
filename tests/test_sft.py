"""``--sft``: conversations that are refused, samples, and documents cut by themselves over context-parallel ranks."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_megatron.training.conversations import Template, parse_line
from lightning_megatron.training.data import check_documents, documents_on_this_cp_rank
from lightning_megatron.training.sft import check
from tests import layers
from tests.helpers.conversations import write_conversations
from tests.helpers.training import MODELS, SIZE, TRAIN, assert_same_training, train_conversations
from tests.launch import run_pretrain, spawn

# ---- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Flags of a tokenizer of one token a word, and of packed conversations whose lengths divide by nothing."""
    return write_conversations(tmp_path_factory.mktemp("sft"))


CHATML = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)


def chat_tokenizer(folder, template=CHATML, **special):
    """One token a word; ``special``: pad_token, eos_token."""
    words = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "system", "user", "assistant", "tool"]
    words += [f"w{i}" for i in range(50)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    made.chat_template = template
    made.save_pretrained(folder)
    return folder


def megatrons(folder, prompt_format="default"):
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(folder, {"library": "sft"}, prompt_format=prompt_format)


def sample_of(dataset_class, tokenizer, rows, length, cp=1, index=0):
    from megatron.core.datasets.utils import Split

    config = SimpleNamespace(
        tokenizer=tokenizer, sequence_length=length, context_parallel_size=cp, reset_position_ids=False,
        create_attention_mask=False, reset_attention_mask=False, allow_ambiguous_pad_tokens=False, random_seed=1,
        split="1", split_matrix=None,
    )  # fmt: skip
    return dataset_class(rows, "data.jsonl", np.arange(len(rows)), 1, Split.train, config)[index]


# the layout pp2-cp2 has a distributed optimizer, which takes Adam only
STAGES = {"pp2": "pp2", "pp2-cp2-sgd": (4, "--pipeline-model-parallel-size 2 --context-parallel-size 2")}


@pytest.fixture(scope="module")
def hybrid(data, tmp_path_factory):
    """Flags that load the same initial values of freq4 into every layout, and the run of one process by SGD."""
    folder = tmp_path_factory.mktemp("initial")
    train_conversations(
        "freq4", "one", data, f"--lr 0 --train-iters 1 --save {folder} --save-interval 1 --no-save-optim"
    )
    # where Adam would make rounding larger
    flags = f"--optimizer sgd --lr 0.1 --load {folder} --finetune --no-load-optim --no-load-rng"
    one = train_conversations("freq4", "one", data, flags)
    assert one.losses[-1] < one.losses[0] - 0.05
    return flags, one


@pytest.mark.parametrize("layout", STAGES.values(), ids=STAGES)
def test_pipeline_stages_train_as_one(layout, data, hybrid):
    """Every stage learns where documents end, and cuts them over context-parallel ranks."""
    flags, one = hybrid
    assert_same_training(train_conversations("freq4", layout, data, flags), one, losses=5e-6)


@pytest.mark.parametrize("model", ["all", "freq4"])
def test_context_parallel_ranks_train_as_one(model, data):
    """freq4 is a hybrid with rope: its softmax layer keeps documents apart, too."""
    one = train_conversations(model, "one", data)
    assert one.losses[-1] < one.losses[0] - 0.05
    # Adam makes rounding of almost zero gradients larger: 9e-6 after six steps; tokens in wrong places are off by 2e-2
    assert_same_training(train_conversations(model, "cp2", data), one, losses=5e-5, norms=1e-2)


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


# ---- conversations that cannot work --------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
BAD = {
    "latin-1": ('{"messages": "é"}'.encode("latin-1"), "byte 14 is not UTF-8; save the file as UTF-8"),
    "utf-16": ('{"messages": []}'.encode("utf-16"), "byte 0 is not UTF-8"),
    "no-json": (b"What is it?\tA word.", "is no JSON .*write one object on every line"),
    "whole-array": (b"[", "is no JSON"),
    "array": (json.dumps([USER, ANSWER]), 'is list, without a list "messages"; write'),
    "sharegpt": ({"conversations": [{"from": "human", "value": "w1"}]}, "an object with conversations, without"),
    "empty": ({"messages": []}, "there is no message; leave it out"),
    "empty-second": ({"messages": [[USER, ANSWER], []]}, "conversation 2: there is no message"),
    "human": ({"messages": [{"role": "human", "content": "w1"}, ANSWER]}, 'message 1: role is "human"; .*must be one'),
    "no-content": ({"messages": [{"role": "user"}, ANSWER]}, 'message 1 is .*must have "role" and "content"'),
    "parts": ({"messages": [USER | {"content": [{"type": "text"}]}, ANSWER]}, "message 1: content is .*be a string"),
    "late-system": ({"messages": [[USER, {"role": "system", "content": "w1"}, ANSWER]]}, "message 2: a system message"),
    "two-answers": ({"messages": [USER, ANSWER, ANSWER]}, "message 3: an assistant answers assistant"),
    "answer-first": ({"messages": [ANSWER, USER]}, "message 1: an assistant answers nobody"),
    "empty-answer": ({"messages": [USER, ANSWER | {"content": ""}]}, "message 2: the answer is empty"),
    "no-answer": ({"messages": [USER]}, "no message is the assistant's"),
    "surrogate": ({"messages": [USER | {"content": "\ud800"}, ANSWER]}, "half of a surrogate pair"),
    "surrogate-name": ({"messages": [USER | {"name": ["\ud800"]}, ANSWER]}, "message 1: 'name' holds .*half"),
    "tools": ({"messages": [USER, ANSWER], "tools": [{"type": "function"}]}, 'has "tools", which no chat template'),
    "weight": ({"messages": [USER, ANSWER | {"weight": 0}]}, 'message 2: "weight" is 0, and all answers count'),
}  # fmt: skip


@pytest.mark.parametrize("line, message", BAD.values(), ids=BAD)
def test_lines_that_are_refused(line, message):
    line = json.dumps(line) if isinstance(line, dict) else line
    with pytest.raises(ValueError, match=f"(?s)chat.jsonl, line 7.*{message}"):
        parse_line(line if isinstance(line, bytes) else line.encode(), "chat.jsonl, line 7")


def test_lines_that_are_taken():
    system = {"role": "system", "content": "w3"}
    one, two = [system, USER, ANSWER, USER, ANSWER], [system, USER, {"role": "tool", "content": ""}, ANSWER]
    line = json.dumps({"id": 1, "messages": one + two}).encode()
    assert parse_line(b"\xef\xbb\xbf" + line + b"\r\n", "") == [one, two]
    assert parse_line(json.dumps({"messages": [[USER, ANSWER], one]}).encode(), "") == [[USER, ANSWER], one]


ENDS = {  # what is wrong -> flags, template, third line of the data, message
    "line": ("", CHATML, {"messages": [USER | {"role": "gpt"}]}, 'chat.jsonl, line 3, message 1: role is "gpt"'),
    "listed": ("--data-args-path", CHATML, {"messages": []}, "chat.jsonl, line 3"),
    "template": (
        "", "{{ raise_exception('no system') }}", {"messages": [USER, ANSWER]},
        "chat.jsonl, line 1: the chat template does not take the conversation: no system",
    ),
    "no-template": ("", None, {}, "has no chat template; give one that has"),
    "format": ("--sft-tokenizer-prompt-format nemotron-nano-v2", CHATML, {}, "nemotron-nano-v2 counts answers only"),
    "tokenizer": ("--tokenizer-type HuggingFaceTokenizer", CHATML, {}, "--sft needs --tokenizer-type SFTTokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("flags, template, third, message", ENDS.values(), ids=ENDS)
def test_runs_that_end_before_training(flags, template, third, message, tmp_path):
    folder = chat_tokenizer(tmp_path / "tokenizer", template, pad_token="<pad>", eos_token="<|im_end|>")
    data = tmp_path / "chat.jsonl"
    lines = [{"messages": [USER, ANSWER]}] * 2 + [third or {"messages": [USER, ANSWER]}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    size = [*SIZE[: SIZE.index("--vocab-size")], *SIZE[SIZE.index("--vocab-size") + 2 :]]
    command = [*size, *TRAIN, *MODELS["all"].split(), "--sft", "--tokenizer-type", "SFTTokenizer"]
    command += ["--tokenizer-model", folder, "--sft-tokenizer-prompt-format", "default"]
    if flags == "--data-args-path":
        (tmp_path / "paths").write_text(f"1 {data}")
        command += ["--split", "1,0,0", flags, tmp_path / "paths"]
        flags = ""
    else:
        command += ["--train-data-path", data]
    run = run_pretrain([*command, "--lightning-sft-answers-only", *flags.split()], check=False)
    last = run.log.strip().splitlines()[-1]
    assert not run.ok and last.startswith("lightning-pretrain: ") and message in last, run.log[-2000:]


def padded(messages, tokenizer, length, cp):
    """Which places of a sample hold no token of its conversations, which begin with a system message each."""
    starts = [place for place, message in enumerate(messages) if message["role"] == "system"]
    places = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        ids, _ = tokenizer.tokenize_conversation(messages[start:end], return_target=True, add_generation_prompt=False)
        places += [False] * len(ids) + [True] * (-len(ids) % (2 * cp) if cp > 1 else 0)
    return (places + [True] * length)[:length]


# ---- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cp", [1, 2])
@pytest.mark.parametrize("length", [32, 64, 512])
def test_samples_are_those_of_megatron(cp, length, data):
    """In its own format, by which answers count: tokens that fit, that are cut off, and padding."""
    from megatron.training.datasets.sft_dataset import SFTDataset

    from lightning_megatron.training.sft import ChatDataset, Lines

    path, folder = data[data.index("--data-path") + 1], data[data.index("--tokenizer-model") + 1]
    ours, tokenizer = Lines(str(path)), megatrons(str(folder), "nemotron-h-aligned")
    theirs = [json.loads(line)["messages"] for line in path.read_text("utf-8").splitlines()]
    assert len(ours) == len(theirs) == 32
    for index in range(8):
        found = sample_of(ChatDataset, tokenizer, ours, length, cp, index)
        wanted = sample_of(SFTDataset, tokenizer, theirs, length, cp, index)
        padding = found.pop("padding_mask")
        assert padding.dtype == torch.bool and padding.tolist() == padded(theirs[index], tokenizer, length, cp)
        assert found.keys() == wanted.keys()
        wanted["labels"][wanted["loss_mask"] == 0] = found["labels"][found["loss_mask"] == 0]  # of no account
        for name, x in wanted.items():
            assert torch.equal(found[name], x) and found[name].dtype == x.dtype, name


@pytest.mark.parametrize("special", [dict(pad_token="<pad>", eos_token="<|im_end|>"), dict(eos_token="<|im_end|>")])
def test_answers_and_their_ends_count(special, tmp_path, caplog):
    """All words that an assistant says, and the end of each answer, where that is the padding, too."""
    from lightning_megatron.training.sft import AnswersDataset, Lines

    first = [{"role": "system", "content": "w9"}, USER, ANSWER, {"role": "user", "content": "w3 w4"}, ANSWER]
    second = [USER, {"role": "assistant", "content": "w5 w6 w7"}]
    (tmp_path / "chat.jsonl").write_text("\n" + json.dumps({"messages": [first, second]}) + "\n\n")
    tokenizer = megatrons(str(chat_tokenizer(tmp_path / "tokenizer", **special)))
    words = tokenizer._tokenizer._tokenizer
    text = (
        "<|im_start|> system w9 <|im_end|> <|im_start|> user w1 <|im_end|> <|im_start|> assistant [w2] [<|im_end|>] "
        "<|im_start|> user w3 w4 <|im_end|> <|im_start|> assistant [w2] [<|im_end|>] # # # "
        "<|im_start|> user w1 <|im_end|> <|im_start|> assistant [w5] [w6] [w7] [<|im_end|>] # #"
    ).split()
    assert len(text) == 36
    ids = [tokenizer.pad if w == "#" else words.convert_tokens_to_ids(w.strip("[]")) for w in text]
    labels = [id if word[0] == "[" else -100 for id, word in zip(ids, text, strict=True)]
    rows = Lines(str(tmp_path / "chat.jsonl"))
    found = sample_of(AnswersDataset, tokenizer, rows, 36, cp=2)
    assert found["tokens"].tolist() == ids and found["labels"].tolist() == labels[1:] + [-100]
    assert found["loss_mask"].tolist() == [float(label >= 0) for label in found["labels"]]
    assert found["cu_seqlens"].unique().tolist() == [0, 24, 36] and found["max_seqlen"] == 24
    assert found["padding_mask"].tolist() == [word == "#" for word in text]  # also where the end of an answer is it
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found = sample_of(AnswersDataset, tokenizer, rows, 28, cp=2)
    assert found["tokens"].tolist() == ids[:28] and found["cu_seqlens"].unique().tolist() == [0, 24, 28]
    assert "chat.jsonl, line 2 has 36 tokens, and --seq-length is 28" in caplog.text


# what is before an answer, and behind it -> the template that writes so, and what its prompt ends with beyond that
ROUND = {
    "chatml": ("<|im_start|>assistant\n", "<|im_end|>\n", ""),
    "thinks": ("<|im_start|>assistant\n", "<|im_end|>\n", "<think>\n"),
    "space": ("assistant: ", "\n", ""),
    "space-thinks": ("assistant: ", "\n", "<think>"),
}


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("before, behind, thought", ROUND.values(), ids=ROUND)
def test_every_token_that_holds_some_of_an_answer_counts_and_no_other(before, behind, thought, trim):
    """Places in bytes, from the tokens' own characters: a token may begin before an answer, where a prompt ends in a
    space, and an answer may begin as a thought does."""
    answers = [
        "yes",
        "<table> x",
        "<think>\nno\n</think>\n\nyes",
        "<thing",
        "\U0001f600 yes",
        "日本",
        " x ",
        "\n\nx",
        "t",
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator([f"assistant: {x} user: {x}" for x in answers] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>")
    head = before.replace("assistant", "' + m['role'] + '").replace("\n", "\\n")
    tokenizer.chat_template = (
        f"{{% for m in messages %}}{{{{ '{head}' + m['content'] + {behind!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {before + thought!r} }}}}{{% endif %}}"
    )
    # one byte of a token's text has one character, the other 68 are those from 256 on
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(x): x for x in plain} | {chr(256 + i): x for i, x in enumerate(sorted({*range(256)} - {*plain}))}
    for answer in answers:
        turns = [("user", "what"), ("assistant", answer), ("user", "no"), ("assistant", answer)]
        text, wanted = b"", []  # of every byte, whether it is an answer's
        for role, content in turns:
            parts = before.replace("assistant", role), content, behind
            # with a prompt that thinks, thoughts begin in the prompt
            given = thought if role == "assistant" and content.startswith(thought) else ""
            kinds = False, role == "assistant", role == "assistant"
            for i, (part, kind) in enumerate(zip(parts, kinds, strict=True)):
                data = part.encode()
                text += data
                wanted += [kind and not (i == 1 and place < len(given)) for place in range(len(data))]
        ids, labels = Template(tokenizer).encode([{"role": role, "content": content} for role, content in turns])
        place = 0
        for id, label in zip(ids, labels, strict=True):
            token = tokenizer.convert_ids_to_tokens(id)
            data = token.encode() if token in special else bytes(byte_of[x] for x in token)
            assert text[place : place + len(data)] == data
            counts = any(wanted[place : place + len(data)])
            if not (trim and data.isspace()):  # of such a tokenizer a space is nowhere
                assert label == (id if counts else -100), (answer, token, place)
            place += len(data)
        assert place == len(text)


def arguments(path, prompt_format="default", *, answers_only=False):
    """Of ``check``."""
    return SimpleNamespace(
        sft=True, sft_answers_only=answers_only, tokenizer_type="SFTTokenizer", tokenizer_model="TOKENIZER", rank=0,
        sft_tokenizer_prompt_format=prompt_format, data_path=None, train_data_path=[str(path)], valid_data_path=None,
        test_data_path=None, data_args_path=None, per_split_data_args_path=None,
    )  # fmt: skip


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("end", ["<|im_end|>", "tool"])
def test_answers_whose_end_is_not_the_tokenizers_are_named(end, answers_only, tmp_path, caplog):
    """Generation stops at the tokenizer's end alone."""
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    tokenizer = megatrons(str(chat_tokenizer(tmp_path / "t", pad_token="<pad>", eos_token=end)))
    with caplog.at_level(logging.WARNING):
        check(arguments(tmp_path / "c.jsonl", answers_only=answers_only), tokenizer)
    named = "chat template of TOKENIZER ends no answer with tool, the tokenizer's end: generation with --chat goes on"
    assert (named in caplog.text) == (end == "tool")


def test_a_line_of_which_nothing_counts_is_named(tmp_path, caplog):
    from lightning_megatron.training.sft import AnswersDataset, Lines

    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    tokenizer = megatrons(str(chat_tokenizer(tmp_path / "t", pad_token="<pad>", eos_token="<|im_end|>")))
    for length, loss in ((6, 0), (7, 1)):  # six tokens before the answer
        caplog.clear()
        found = sample_of(AnswersDataset, tokenizer, Lines(str(tmp_path / "c.jsonl")), length)
        assert found["loss_mask"].sum() == loss
        assert (f"line 1: nothing before --seq-length {length} counts" in caplog.text) == (not loss)


SHORT = {
    "once": ("A B", "the training have 3 samples, as several paths without weights are read once, and it reads 4"),
    "split": ("--split 969,30,1", "has 3 lines, and none of them for the valid split: give another --split"),
}  # fmt: skip


@pytest.mark.parametrize("flags, message", SHORT.values(), ids=SHORT)
def test_data_that_end_before_the_training_are_refused(flags, message, tmp_path):
    """Megatron ended in a StopIteration, behind a part of the training."""
    folder = chat_tokenizer(tmp_path / "tokenizer", pad_token="<pad>", eos_token="<|im_end|>")
    for name, lines in (("A", 1), ("B", 2), ("C", 3)):
        (tmp_path / name).write_text(lines * (json.dumps({"messages": [USER, ANSWER]}) + "\n"))
    size = [*SIZE[: SIZE.index("--vocab-size")], *SIZE[SIZE.index("--vocab-size") + 2 :]]
    command = [*size, *TRAIN, *MODELS["all"].split(), "--sft", "--tokenizer-type", "SFTTokenizer", "--tokenizer-model"]
    command += [folder, "--sft-tokenizer-prompt-format", "default", "--train-iters", "2", "--eval-iters", "1"]
    if flags == "A B":
        command += ["--train-data-path", tmp_path / "A", tmp_path / "B", "--valid-data-path", tmp_path / "C"]
    else:
        command += ["--data-path", tmp_path / "C", *flags.split()]
    run = run_pretrain(command, check=False)
    last = run.log.strip().splitlines()[-1]
    assert not run.ok and last.startswith("lightning-pretrain: ") and message in last, run.log[-2000:]
    if flags != "A B":  # parts that nobody reads may be empty
        assert len(run_pretrain([*command, "--eval-iters", "0"]).losses) == 2


@pytest.mark.parametrize("second, message", [
    ({"role": "tool", "content": "w1"}, "nemotron-h-aligned leaves out messages of role tool: use default"),
    (ANSWER | {"content": " "}, "nemotron-h-aligned: the tokens of the messages are not those of the conversation"),
])  # fmt: skip
def test_conversations_that_a_format_of_megatrons_does_not_take(second, message, tmp_path):
    """Nemotron's template left out what tools say, and failed on an answer of white space in the training."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<SPECIAL_10>", "<SPECIAL_11>", "<SPECIAL_12>", "<SPECIAL_233>", "<eos>"]
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(["User\n\nAssistant\n\n"] * 9, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(tmp_path / "t")
    tokenizer = megatrons(str(tmp_path / "t"), "nemotron-h-aligned")
    args = arguments(tmp_path / "c.jsonl", "nemotron-h-aligned")
    for conversation in ([USER, ANSWER], [USER, second] + [ANSWER] * (second["role"] == "tool")):
        with (tmp_path / "c.jsonl").open("a") as file:
            file.write(json.dumps({"messages": conversation}) + "\n")
        if second not in conversation:
            check(args, tokenizer)
    with pytest.raises(ValueError, match=f"c.jsonl, line 2: --sft-tokenizer-prompt-format {message}"):
        check(args, tokenizer)


@pytest.mark.parametrize("role", ["assistant", "tool"])
def test_a_template_that_leaves_a_message_out(role, tmp_path):
    leaves = CHATML.replace("{{ '<|im_start|> ' + m", "{% if m['role'] != '" + role + "' %}{{ '<|im_start|> ' + m")
    leaves = leaves.replace("{% endfor %}", "{% endif %}{% endfor %}")
    folder = chat_tokenizer(tmp_path, leaves)
    from transformers import AutoTokenizer

    conversation = [USER, {"role": "tool", "content": "w3"}, ANSWER]
    number = 2 if role == "tool" else 3
    with pytest.raises(ValueError, match=f"leaves out message {number}, of role {role}"):
        Template(AutoTokenizer.from_pretrained(folder)).answers(conversation)


def test_a_conversation_without_tokens_shifts_no_labels(tmp_path):
    """White space may have none: labels of those behind it were one token late."""
    from lightning_megatron.training.sft import ChatDataset, Lines

    nothing = [USER | {"content": ""}, ANSWER | {"content": " "}]
    words = [USER, ANSWER | {"content": " w5 w6 w7"}]
    tokenizer = megatrons(str(chat_tokenizer(tmp_path / "t", None, pad_token="<pad>")), "identity")
    for rows in ([nothing, words], [words, nothing, words]):
        (tmp_path / "c.jsonl").write_text(json.dumps({"messages": rows}) + "\n")
        found = sample_of(ChatDataset, tokenizer, Lines(str(tmp_path / "c.jsonl")), 10)
        tokens, labels = found["tokens"].tolist(), found["labels"].tolist()
        first = sum(row is words for row in rows)
        ids = tokenizer._tokenizer._tokenizer("w1 w5 w6 w7")["input_ids"]
        assert tokens == ids * first + [tokenizer.pad] * (10 - 4 * first)
        assert labels == [*ids[1:], -100] * first + [-100] * (10 - 4 * first)


def test_templates_that_think(tmp_path):
    """The prompt may end in a begin of thoughts that the answer lacks; a template that forgets an answer is refused."""
    from transformers import AutoTokenizer

    conversation = [USER, ANSWER, USER, ANSWER]
    folder = chat_tokenizer(tmp_path / "a", CHATML.replace("<|im_start|> assistant '", "<|im_start|> assistant tool '"))
    text, spans = Template(AutoTokenizer.from_pretrained(folder)).answers(conversation)
    assert [text[a:b].split() for a, b in spans] == [["w2", "<|im_end|>"]] * 2
    forgets = CHATML.replace("{{ '<|im_start|> ' +", "{% if loop.last or m['role'] == 'user' %}{{ '<|im_start|> ' +")
    forgets = forgets.replace("{% endfor %}", "{% endif %}{% endfor %}")
    template = Template(AutoTokenizer.from_pretrained(chat_tokenizer(tmp_path / "b", forgets)))
    assert len(template.answers(conversation[:2])[1]) == 1
    with pytest.raises(ValueError, match="writes earlier messages in another way"):
        template.answers(conversation)
