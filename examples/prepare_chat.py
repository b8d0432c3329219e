"""Turn conversations into what fine-tuning with Megatron's --sft reads.

    python examples/prepare_chat.py pack chat.jsonl --tokenizer Ring-mini-linear-2.0 --seq-length 8192 --out data
    python examples/prepare_chat.py questions --out chat.jsonl           # on Python's standard library, to try it out
    python examples/prepare_chat.py tokenizer chat.jsonl --out tokenizer # a small one, with a chat template

A line of chat.jsonl is one conversation, with or without a system message, of as many turns as there are:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

`pack` writes train.jsonl and valid.jsonl, in which a line holds as many conversations as --seq-length has room for:
without it every conversation is padded to the whole length. They do not see each other in training.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
from collections.abc import Iterator
from pathlib import Path

import stoppable
from outputs import unwritable
from text_sources import stdlib_files

MAX_ANSWER = 300  # characters of an answer in `questions`
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def questions() -> Iterator[list[dict[str, str]]]:
    """Two questions on each public function and class with a docstring, and their answers."""
    root = Path(ast.__file__).parent
    for path in stdlib_files():
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for node in ast.parse(path.read_bytes()).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            if not text or len(text) > MAX_ANSWER:
                continue
            name = f"{module}.{node.name}"
            if isinstance(node, ast.FunctionDef):
                pairs = [(f"What does {name} do?", text)]
                pairs.append(("How is it called?", f"{name}({ast.unparse(node.args)})"))
            else:
                bases = ", ".join(map(ast.unparse, node.bases)) or "object"
                pairs = [(f"What is {name}?", text), ("What is it derived from?", f"It is derived from {bases}.")]
            yield [
                {"role": role, "content": content}
                for pair in pairs
                for role, content in zip(("user", "assistant"), pair, strict=True)
            ]


def write_lines(files: dict[Path, list]) -> None:
    """Write all files, or none. A file without rows is removed: it would be of an earlier run."""
    aside = {path: path.with_name(path.name + ".partial") for path, rows in files.items() if rows}
    try:
        for path, partial in aside.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in files[path])
            partial.write_text("".join(lines), "utf-8")
        for path in files:  # first, so that no two files of different runs stand side by side
            path.unlink(missing_ok=True)
        for path, partial in aside.items():
            partial.replace(path)
    finally:
        for partial in aside.values():
            partial.unlink(missing_ok=True)


def write_questions(args: argparse.Namespace) -> None:
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count {args.count} must be at least 1; leave it out for all")
    rows = list(questions())
    random.Random(args.seed).shuffle(rows)
    write_lines({args.out: rows[: args.count]})
    print(f"  {len(rows[: args.count])} conversations: {args.out}")


def write_tokenizer(args: argparse.Namespace) -> None:
    """A byte-level BPE, which reads any text, with ChatML's template; AutoTokenizer loads the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    least = len(special) + len(pre_tokenizers.ByteLevel.alphabet())
    if args.vocab_size < least:
        raise ValueError(f"--vocab-size {args.vocab_size} must be at least {least}: all bytes, and tokens of the chat")
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((x["content"] for row in read(args.data) for x in row), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2])
    made.add_special_tokens({"additional_special_tokens": special[1:2]})
    made.chat_template = CHATML
    made.save_pretrained(args.out)
    print(f"  {len(made)} tokens: {args.out}")


def read(paths: list[Path]) -> Iterator[list[dict[str, str]]]:
    from lightning_megatron.training import conversations as chat

    for path in paths:
        for _, conversations in chat.read(path):
            yield from conversations


def pack(lengths: list[int], room: int) -> list[list[int]]:
    """Numbers of conversations that share a sequence: each, from the longest, goes where it leaves least room."""
    bins: list[list[int]] = []
    left: dict[int, list[int]] = {}  # room that is left -> sequences
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size = min(lengths[number], room)
        rest = min((x for x in left if x >= size), default=None)
        if rest is None:
            bins.append([])
            index, rest = len(bins) - 1, room
        else:
            index = left[rest].pop()
            if not left[rest]:
                del left[rest]
        bins[index].append(number)
        left.setdefault(rest - size, []).append(index)
    return bins


def write_packed(args: argparse.Namespace) -> None:
    if not 0 <= args.held_out < 1:  # NaN, too
        raise ValueError(f"--held-out {args.held_out} must be a fraction from 0, for none, to below 1, such as 0.02")
    if args.context_parallel_size < 1:
        raise ValueError(f"--context-parallel-size {args.context_parallel_size} must be at least 1")
    every = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1  # as in training
    if args.seq_length < 2 or args.seq_length % every:
        raise ValueError(
            f"--seq-length {args.seq_length} must be at least 2, and divide by 2 x --context-parallel-size where "
            "that is above 1; give that of the training"
        )
    from transformers import AutoTokenizer

    from lightning_megatron.training import conversations as chat

    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    except (ValueError, OSError) as error:
        raise ValueError(f"--tokenizer {args.tokenizer}: transformers finds no tokenizer there: {error}") from error
    template = chat.Template(tokenizer)
    kept, long, lost = [], 0, 0
    for path in args.data:
        for where, conversations in chat.read(path):
            for conversation in conversations:
                try:
                    ids, labels = template.encode(conversation)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
                long += len(ids) > args.seq_length
                answers = sum(label != chat.IGNORED for label in labels[1 : args.seq_length])
                lost += not answers
                if answers:
                    kept.append((conversation, -(-len(ids) // every) * every, answers))
    random.Random(args.seed).shuffle(kept)
    held = max(1, round(args.held_out * len(kept))) if args.held_out else 0
    if len(kept) <= held:
        raise ValueError(f"{len(kept)} conversations are too few to hold {held} out; give more, or --held-out 0")
    packed = {}
    for name, part in (("train", kept[held:]), ("valid", kept[:held])):
        bins = pack([length for _, length, _ in part], args.seq_length)
        random.Random(args.seed).shuffle(bins)
        packed[name] = part, bins
    write_lines(
        {
            args.out / f"{name}.jsonl": [[part[i][0] for i in numbers] for numbers in bins]
            for name, (part, bins) in packed.items()
        }
    )
    for name, (part, bins) in packed.items():
        if not part:
            continue
        tokens = len(bins) * args.seq_length
        full = sum(min(length, args.seq_length) for _, length, _ in part) / tokens
        counted = sum(answers for *_, answers in part) / tokens
        print(
            f"  {name}.jsonl: {len(part)} conversations in {len(bins)} sequences of {args.seq_length} tokens, "
            f"{full:.0%} full; {counted:.0%} of the tokens are answers"
        )
    if long:
        print(f"  {long} conversations are longer than a sequence: cut off at its end")
    if lost:
        print(f"  {lost} conversations left out: no answer begins before --seq-length {args.seq_length}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="questions | tokenizer | pack")
    made = commands.add_parser("questions", help="questions and answers on Python's standard library")
    made.add_argument("--count", type=int, help="at most so many conversations (default: all)")
    made.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    made.set_defaults(run=write_questions)
    made = commands.add_parser("tokenizer", help="train a tokenizer with a chat template")
    made.add_argument("data", type=Path, nargs="+", help="files of conversations, to train it on")
    made.add_argument("--vocab-size", type=int, default=1024, help="tokens (1024)")
    made.add_argument("--out", type=Path, required=True, help="folder")
    made.set_defaults(run=write_tokenizer)
    made = commands.add_parser("pack", help="several conversations to a sequence")
    made.add_argument("data", type=Path, nargs="+", help="files of conversations")
    made.add_argument("--tokenizer", required=True, help="folder of the model, or of its tokenizer alone")
    made.add_argument("--seq-length", type=int, required=True, help="as in training")
    made.add_argument("--context-parallel-size", type=int, default=1, help="as in training (1)")
    made.add_argument("--held-out", type=float, default=0.02, help="fraction for validation (0.02)")
    made.add_argument("--out", type=Path, required=True, help="folder")
    made.set_defaults(run=write_packed)
    for command in commands.choices.values():
        command.add_argument("--seed", type=int, default=0, help="of the shuffle (0)")
    args = parser.parse_args(argv)
    folder = args.run is not write_questions
    if args.out.exists() and args.out.is_dir() != folder:
        is_, wanted = ("file", "folder") if folder else ("folder", "file")
        raise SystemExit(f"prepare_chat: --out {args.out} is a {is_}; give a {wanted}")
    if reason := unwritable(args.out, folder=folder):
        raise SystemExit(f"prepare_chat: --out {args.out} cannot be written ({reason}); give another")
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_chat: {error}") from error


if __name__ == "__main__":
    stoppable.run(main, "the same command starts from the beginning")
