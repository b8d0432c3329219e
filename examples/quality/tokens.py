"""From the corpus to what Megatron reads: a tokenizer, indexed datasets, and shards that can be sent.

    python -m examples.quality.tokens prepare --out data/quality                  # OUT/corpus -> OUT/data
    python -m examples.quality.tokens split --out data/quality --megabytes 55     # OUT/data -> OUT/shards
    python -m examples.quality.tokens join --out data/quality                     # OUT/shards -> OUT/data

``split`` compresses the files of OUT/data into shards of at most so many megabytes, for machines that take no larger
ones; ``join`` checks their sha256 and puts them together again.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from pathlib import Path

from .packages import sha256

VOCABULARY, SAMPLE_BYTES = 32_000, 40_000_000  # of the tokenizer, and of the text it is trained on
FILES = (
    "tokenizer.model", "stats.json", "train_text_document.bin", "train_text_document.idx",
    "valid_text_document.bin", "valid_text_document.idx",
)  # fmt: skip
PIECE = 1 << 20  # bytes compressed at a time
SLACK = 4 << 20  # of a shard's limit: what the compressor may still hold


def prepare(corpus: Path, data: Path, vocabulary: int, sample_bytes: int, seed: int) -> dict:
    """Train the tokenizer on the training text, and write both datasets; returns what stats.json holds.

    Raises:
        ValueError: too little text for the vocabulary.
    """
    from prepare_data import entropy, load_tokenizer, train_tokenizer, write_dataset

    texts, packages = {}, {}
    for part in ("train", "heldout"):
        with (corpus / f"{part}.jsonl").open("rb") as file:
            rows = [json.loads(line) for line in file]
        texts[part], packages[part] = [row["text"] for row in rows], [row["package"] for row in rows]
    start = time.time()
    model = train_tokenizer(texts["train"], vocabulary, sample_bytes, seed)
    print(f"  tokenizer of {vocabulary} pieces trained in {time.time() - start:.0f} s", flush=True)
    processor = load_tokenizer(model, "the new tokenizer")
    data.mkdir(parents=True, exist_ok=True)
    (data / "tokenizer.model").write_bytes(model)
    counts = write_dataset(texts["train"], processor, data / "train_text_document")
    valid = write_dataset(texts["heldout"], processor, data / "valid_text_document")
    size = {part: sum(len(text.encode()) for text in found) for part, found in texts.items()}
    stats = {
        "vocab_size": vocabulary,
        "train_documents": len(texts["train"]),
        "train_tokens": int(counts.sum()),
        "train_bytes": size["train"],
        "valid_documents": len(texts["heldout"]),
        "valid_tokens": int(valid.sum()),
        "valid_bytes": size["heldout"],
        "valid_packages": packages["heldout"],
        "bytes_per_token": size["train"] / int(counts.sum()),
        "valid_bytes_per_token": size["heldout"] / int(valid.sum()),
        "unigram_entropy": entropy(counts),
        "sha256": {name: sha256(data / name) for name in FILES if name != "stats.json"},
    }
    (data / "stats.json").write_text(json.dumps(stats, indent=1) + "\n")
    return stats


def split(data: Path, shards: Path, limit: int) -> dict:
    """Compress every file of ``data`` into shards of at most ``limit`` bytes; returns what shards.json holds.

    Raises:
        ValueError: a limit below 8 MiB.
    """
    if limit < 2 * SLACK:
        raise ValueError(f"--megabytes {limit / 1e6:g} is less than {2 * SLACK / 1e6:.1f}: give more")
    shards.mkdir(parents=True, exist_ok=True)
    about: dict = {}
    for name in FILES:
        parts = []
        with (data / name).open("rb") as file:
            piece = file.read(PIECE)
            while piece:
                path = shards / f"{name}.{len(parts):03d}.xz"
                compressor, size = lzma.LZMACompressor(preset=4), 0
                with path.open("wb") as out:
                    while piece and size < limit - SLACK:
                        size += out.write(compressor.compress(piece))
                        piece = file.read(PIECE)
                    size += out.write(compressor.flush())
                assert size <= limit, "the compressor held more than SLACK"
                parts.append({"shard": path.name, "bytes": size, "sha256": sha256(path)})
        about[name] = {"sha256": sha256(data / name), "parts": parts}
    (shards / "shards.json").write_text(json.dumps(about, indent=1) + "\n")
    return about


def join(shards: Path, data: Path) -> None:
    """Put the files of ``split`` together again.

    Raises:
        ValueError: a shard, or a file made of them, is missing or has another sha256.
    """
    data.mkdir(parents=True, exist_ok=True)
    for name, file in json.loads((shards / "shards.json").read_text("utf-8")).items():
        with (data / name).open("wb") as out:
            for part in file["parts"]:
                path = shards / part["shard"]
                if not path.is_file() or sha256(path) != part["sha256"]:
                    raise ValueError(f"{path} is missing or was altered: bring it again")
                with lzma.open(path) as shard:
                    while block := shard.read(PIECE):
                        out.write(block)
        if sha256(data / name) != file["sha256"]:
            raise ValueError(f"{data / name} is not what was split: bring all shards again")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "split", "join"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the build")
    parser.add_argument("--vocab-size", type=int, default=VOCABULARY, help="pieces of the tokenizer (%(default)s)")
    parser.add_argument("--sample-bytes", type=int, default=SAMPLE_BYTES, help="text it is trained on (%(default)s)")
    parser.add_argument("--megabytes", type=float, default=55, help="of a shard, at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the tokenizer's sample (%(default)s)")
    options = parser.parse_args(argv)
    corpus, data, shards = (options.out / name for name in ("corpus", "data", "shards"))
    if options.what == "prepare":
        stats = prepare(corpus, data, options.vocab_size, options.sample_bytes, options.seed)
        print(f"{stats['train_tokens']} training tokens, {stats['valid_tokens']} held out")
        print(f"{stats['bytes_per_token']:.3f} bytes per token, unigram entropy {stats['unigram_entropy']:.3f} nats")
    elif options.what == "split":
        about = split(data, shards, int(options.megabytes * 1e6))
        sizes = [part["bytes"] for file in about.values() for part in file["parts"]]
        print(f"{len(sizes)} shards, {sum(sizes) / 1e6:.1f} MB in all, the largest {max(sizes) / 1e6:.1f} MB")
    else:
        join(shards, data)
        print(f"{data} is complete")


if __name__ == "__main__":
    main()
