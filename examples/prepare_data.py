"""Turn text into what Megatron trains on: a SentencePiece tokenizer and indexed datasets.

    python examples/prepare_data.py --out data                            # the sources of Python's standard library
    python examples/prepare_data.py --out data --text book.txt notes/     # any text
    python examples/prepare_data.py --out data --text more.jsonl --tokenizer-model data/tokenizer.model

A document is one file, or the "text" of one line of a file of JSON lines, whatever its name. Files are UTF-8, or begin
with the byte-order mark of UTF-8, UTF-16 or UTF-32, which is no part of the text. Writes to --out:

    tokenizer.model                    for --tokenizer-type SentencePieceTokenizer --tokenizer-model
    train_text_document.{bin,idx}      for --train-data-path, without the ending
    valid_text_document.{bin,idx}      held-out documents, for --valid-data-path
    stats.json                         sizes, and the unigram entropy: the loss of a model that knows no context

Results replace earlier ones when all of them are complete, so that a run that fails leaves those as they are.
All text is held in memory. For hundreds of gigabytes use Megatron-LM's tools/preprocess_data.py with this tokenizer.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import random
import shutil
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import sentencepiece

import stoppable
from outputs import unwritable
from text_sources import read_documents, stdlib_files, text_files

VOCAB_SIZE, SAMPLE_BYTES = 2048, 4_000_000  # of a new tokenizer
LINE = 4096  # characters of a training line of the tokenizer; longer lines are cut
WHOLE = 1 << 16  # characters: a held-out document is not cut where so many are held out
BATCH = 256  # documents encoded at a time
ASIDE = ".prepare_data-"  # how a folder of results that are not complete begins


def take(documents: list[str], max_bytes: int, seed: int) -> list[str]:
    """Shuffle, and keep as many documents as fit into max_bytes."""
    documents = [text for text in documents if text]
    random.Random(seed).shuffle(documents)
    kept, size = [], 0
    for text in documents:
        size += len(text.encode())
        if size > max_bytes and kept:
            break
        kept.append(text)
    return kept


def split(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Training and held-out documents: the first documents that reach `fraction` of the characters are held out.

    Of a document with which it would be most of the text, and above WHOLE, only the end is, cut at a line near there;
    so it is with a single document.

    Raises:
        ValueError: text too short to be divided.
    """
    total = sum(map(len, documents))
    want = fraction * total
    count, size, given = 0, 0, len(documents)
    while size < want and count < given:
        size += len(documents[count])
        count += 1
    if count == given > 1 and len(documents[-1]) <= WHOLE:
        count -= 1  # something must be left to train on
    elif count == given or size > max(2 * want, total / 2, WHOLE):
        text = documents[count - 1]
        end = int(len(text) - (want - (size - len(text))))
        cut = text.rfind("\n", max(0, int(end - want)), end) + 1 or end
        documents = [*documents[: count - 1], text[cut:], text[:cut], *documents[count:]]
    train, valid = documents[count:], documents[:count]
    if not any(train) or not any(valid):
        raise ValueError(f"{given} documents of text cannot be split into training and held-out text; give more")
    return train, valid


def train_tokenizer(documents: list[str], vocab_size: int, sample_bytes: int, seed: int) -> bytes:
    """Train a BPE tokenizer that gives every text back as it was, on a sample of lines.

    Nothing is normalized, bytes stand for characters outside of the vocabulary, and newline and tab are pieces. The one
    exception is SentencePiece's own: it writes a space as U+2581, so a U+2581 in the text comes back as a space.

    Returns:
        the model, as it stands in a tokenizer.model.

    Raises:
        ValueError: too little text for vocab_size.
    """
    lines = [line[i : i + LINE] for text in documents for line in text.split("\n") for i in range(0, len(line), LINE)]
    random.Random(seed).shuffle(lines)
    sample, size = [], 0
    for line in lines:
        size += len(line.encode())
        if size > sample_bytes and sample:
            break
        sample.append(line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,  # indentation
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,  # Megatron's eod
            pad_id=3,
            max_sentence_length=4 * LINE,  # bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"--vocab-size {vocab_size} does not fit {size} bytes of text: give more text or another size ({error})"
        ) from error
    return model.getvalue()


def load_tokenizer(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """The processor of a model.

    Raises:
        ValueError: no SentencePiece model, or one without an end of document; ``name`` says which.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and processor.load_from_serialized_proto(model)
    except RuntimeError:
        loaded = False
    if not loaded:
        raise ValueError(f"{name} is no SentencePiece model; give a tokenizer.model, or leave it out to train one")
    if processor.eos_id() < 0:
        raise ValueError(f"{name} has no </s>, which ends a document")
    return processor


def write_dataset(documents: list[str], processor: sentencepiece.SentencePieceProcessor, prefix: Path) -> np.ndarray:
    """Write prefix.bin and prefix.idx, one Megatron document per text, each ending in eod.

    Returns:
        how often each id was written, int64 [vocabulary].
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # no CUDA needed here
    with warnings.catch_warnings():  # Megatron tells which optional packages are not installed
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab, eod = processor.get_piece_size(), processor.eos_id()
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab))
    counts = np.zeros(vocab, dtype=np.int64)
    for start in range(0, len(documents), BATCH):
        for ids in processor.encode(documents[start : start + BATCH], num_threads=-1):
            ids.append(eod)
            builder.add_document(ids, [len(ids)])
            counts += np.bincount(ids, minlength=vocab)
    builder.finalize(f"{prefix}.idx")
    return counts


def entropy(counts: np.ndarray) -> float:
    """Nats per token of the distribution of single tokens."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results; made if missing")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", type=Path, nargs="+", metavar="PATH", help="text files and folders")
    source.add_argument("--stdlib", action="store_true", help="the standard library's sources (the default)")
    parser.add_argument("--tokenizer-model", type=Path, help="use this SentencePiece model instead of training one")
    parser.add_argument("--vocab-size", type=int, help=f"pieces of the new tokenizer (default: {VOCAB_SIZE})")
    parser.add_argument("--sample-bytes", type=int, help=f"text the tokenizer is trained on (default: {SAMPLE_BYTES})")
    parser.add_argument("--max-bytes", type=float, default=math.inf, help="use no more text than this (default: all)")
    parser.add_argument("--held-out", type=float, default=0.02, help="fraction of the text for validation (0.02)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle of documents (0)")
    args = parser.parse_args(argv)
    try:
        check(args)
        prepare(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_data: {error}") from error


def check(args: argparse.Namespace) -> None:
    """Fill in defaults, and refuse what cannot work before any text is read.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    if not 0 < args.held_out < 1:
        raise ValueError(f"--held-out {args.held_out} must be a fraction between 0 and 1, such as 0.02")
    if not args.max_bytes > 0:  # NaN, too
        raise ValueError(f"--max-bytes {args.max_bytes} must be above 0; leave it out to use all text")
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    for option, value in (("--vocab-size", args.vocab_size), ("--sample-bytes", args.sample_bytes)):
        if value is not None and args.tokenizer_model:
            raise ValueError(
                f"{option} {value} is for a new tokenizer, but --tokenizer-model brings one; leave out one"
            )
        if value is not None and value < 1:
            raise ValueError(f"{option} {value} must be at least 1; leave it out for the default")
    if args.tokenizer_model and not args.tokenizer_model.is_file():
        raise ValueError(f"--tokenizer-model {args.tokenizer_model} does not exist; leave it out to train one")
    args.vocab_size, args.sample_bytes = args.vocab_size or VOCAB_SIZE, args.sample_bytes or SAMPLE_BYTES


def prepare(args: argparse.Namespace) -> None:
    """Make all results in a folder of their own inside of --out, then put them in their places."""
    given = args.tokenizer_model and args.tokenizer_model.read_bytes()
    if args.tokenizer_model:
        load_tokenizer(given, f"--tokenizer-model {args.tokenizer_model}")  # now, rather than after reading all text

    files = text_files(args.text) if args.text else stdlib_files()
    documents = take(list(read_documents(files)), args.max_bytes, args.seed)
    if not documents:
        raise ValueError(f"no text in {len(files)} files")
    train, valid = split(documents, args.held_out)
    train_bytes, valid_bytes = (sum(len(text.encode()) for text in part) for part in (train, valid))
    print(f"  {len(documents)} documents of {len(files)} files: {(train_bytes + valid_bytes) / 1e6:.2f} MB of text")

    if reason := unwritable(args.out, folder=True):  # before the tokenizer, which takes minutes
        raise ValueError(f"--out {args.out} cannot be written to ({reason}); give another folder")
    start = time.time()
    model = given or train_tokenizer(train, args.vocab_size, args.sample_bytes, args.seed)
    if not given:
        print(f"  tokenizer of {args.vocab_size} pieces trained in {time.time() - start:.1f} s")
    processor = load_tokenizer(model, "the new tokenizer")

    args.out.mkdir(parents=True, exist_ok=True)
    for folder in sorted(args.out.glob(f"{ASIDE}*")):
        print(f"  {folder} is of a run that was killed, or that still runs; remove it if none does")
    with tempfile.TemporaryDirectory(prefix=ASIDE, dir=args.out) as folder:
        aside = Path(folder)
        (aside / "tokenizer.model").write_bytes(model)
        counts = write_dataset(train, processor, aside / "train_text_document")
        valid_counts = write_dataset(valid, processor, aside / "valid_text_document")
        tokens, nats = int(counts.sum()), entropy(counts)
        stats = {
            "train_documents": len(train),
            "train_bytes": train_bytes,
            "train_tokens": tokens,
            "valid_documents": len(valid),
            "valid_bytes": valid_bytes,
            "valid_tokens": int(valid_counts.sum()),
            "vocab_size": processor.get_piece_size(),
            "bytes_per_token": train_bytes / tokens,
            "unigram_entropy": nats,  # nats per token, as Megatron's lm loss
            "unigram_bits_per_byte": nats / math.log(2) * tokens / train_bytes,
        }
        (aside / "stats.json").write_text(json.dumps(stats, indent=2) + "\n")
        put_in_place(aside, args.out)
    print(
        f"  {tokens} training tokens, {stats['valid_tokens']} held out; {stats['bytes_per_token']:.2f} bytes per token"
    )
    print(f"  unigram entropy {nats:.3f} nats per token, {stats['unigram_bits_per_byte']:.3f} bits per byte")


def put_in_place(aside: Path, out: Path) -> None:
    """Move all files of ``aside`` to ``out``, over those of the same names. stats.json comes last: it says "complete".

    Raises:
        ValueError: a folder has one of the names; nothing was moved.
    """
    names = sorted((path.name for path in aside.iterdir()), key=lambda name: name == "stats.json")
    for name in names:
        if (out / name).is_dir():
            raise ValueError(f"{out / name} is a folder, and the place of a file; move it away, or give another --out")
    (out / "stats.json").unlink(missing_ok=True)
    for name in names:
        if name.endswith(".idx"):  # Megatron's indices into an earlier file of this name
            shutil.rmtree(out / name.removesuffix(".idx") / "cache", ignore_errors=True)
        (aside / name).replace(out / name)


if __name__ == "__main__":
    stoppable.run(main, "the same command starts from the beginning")
