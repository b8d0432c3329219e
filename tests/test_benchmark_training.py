"""The training benchmark: commands, equal tokens, operations, what becomes of failures, and one real process."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_megatron.config import LightningOptions
from lightning_megatron.patches import flops as megatron_flops
from tests.benchmarks import training, training_models
from tests.benchmarks.training_run import summarize
from tests.launch import run_pretrain
from tests.tolerances import PRINTED_LOSS

TOY = "--models toy --lengths 64 96 --tokens-per-step 384 --tokens-per-microbatch 192 --steps 3 --cpu".split()


def commands(capsys, *argv: str) -> list[str]:
    assert training.main([*argv, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def test_commands_in_process(capsys):
    lightning, softmax, hybrid = commands(
        capsys,
        *("--attentions", "lightning", "softmax", "hybrid", "--lengths", "32K", "1K", "92K"),
        *("--tensor-parallel", "2", "--recompute", "--extra=--seed 7"),
    )
    for line in (lightning, softmax, hybrid):
        assert "--nproc-per-node=2 -m tests.benchmarks.training_run " in line and line.endswith("--seed 7")
        assert '"cells": [[1024, 32, 256], [32768, 1, 8], [94208, 1, 3]]' in line
        assert "--seq-length 1024 --max-position-embeddings 94208 --micro-batch-size 32 --global-batch-size 256" in line
        assert "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full" in line
        assert "--mock-data --tokenizer-type NullTokenizer --vocab-size 31999" in line
    assert [line.count('"softmax": true') for line in (lightning, softmax, hybrid)] == [0, 1, 0]
    assert [line.count("--linear-attention-freq 8") for line in (lightning, softmax, hybrid)] == [0, 0, 1]


def test_commands_of_data_parallel_ranks(capsys):
    """Each of two pairs of GPUs has sequences of its own, in equal numbers."""
    argv = "--attentions lightning --lengths 64K 1M --context-parallel 2 --data-parallel 2".split()
    (line,) = commands(capsys, *argv)
    assert "--nproc-per-node=4 " in line and '"cells": [[65536, 1, 4], [1048576, 1, 2]]' in line
    assert line.endswith(
        "--context-parallel-size 2 --overlap-grad-reduce --overlap-param-gather --transformer-impl local --mock-data "
        "--tokenizer-type NullTokenizer --vocab-size 31999"
    )


def test_commands_of_layers_and_further_flags(capsys):
    """A run for each, local layers where nothing else is said."""
    argv = "--attentions lightning --lengths 8K --layers te te-delayed te-tensorwise te-blockwise".split()
    lines = commands(capsys, *argv, "--extra=--fp8-param-gather --x 1", "--extra=")
    assert [line.endswith("--fp8-param-gather --x 1") for line in lines] == [True, False] * 4
    assert all(line.count("--transformer-impl transformer_engine") == 1 for line in lines)
    recipes = [line.split("--fp8-recipe ")[1].split()[0] if "--fp8-recipe" in line else None for line in lines[::2]]
    assert recipes == [None, "delayed", "tensorwise", "blockwise"]
    assert ["--fp8-format hybrid" in line for line in lines[::2]] == [False, True, True, False]
    (line,) = commands(capsys, "--attentions", "lightning", "--lengths", "8K")
    assert "--transformer-impl local --mock-data" in line and "--fp8" not in line


def test_rows_of_other_layers_stand_beside_those_of_older_files():
    old = row("lightning", 8192, 100_000)
    rows = [old, row("lightning", 8192, 140_000, layers="te-delayed"), row("softmax", 8192, 50_000, layers="local")]
    lines = training.table(rows).splitlines()
    assert [line.split()[-1] for line in lines] == ["8K", "100,000", "2.00", "140,000", "50,000"]
    assert lines[3].startswith("0.4B lightning, te-delayed ")


def test_commands_of_single_cells(capsys):
    lines = commands(
        capsys, "--no-in-process", "--lengths", "2K", "8K", "--data", "/d/text", "--tokenizer", "/d/t.model"
    )
    assert len(lines) == 4
    assert all("--nproc-per-node=1 -m lightning_megatron.pretrain --num-layers 24" in line for line in lines[:2])
    assert all("-m tests.benchmarks.training_run" in line and '"cells": []' in line for line in lines[2:])
    for line, length in zip(lines, (2048, 8192) * 2, strict=True):
        assert f"--seq-length {length} --max-position-embeddings {length}" in line
        assert "--data-path /d/text" in line and "SentencePieceTokenizer --tokenizer-model /d/t.model" in line


@pytest.mark.parametrize(
    "argv, flags",
    [
        ("--cuda-graph", "full_iteration --cuda-graph-warmup-steps 1 --no-check-for-nan-in-loss-and-grad"),
        ("--cuda-graph local", "local --cuda-graph-warmup-steps 1 --transformer-impl local --mock-data"),
        (
            "--cuda-graph local:attn,mlp",
            "local --cuda-graph-warmup-steps 1 --cuda-graph-modules attn mlp --transformer-impl local --mock-data",
        ),
    ],
)
def test_commands_of_graphs(argv, flags, capsys):
    (line,) = commands(capsys, *"--attentions lightning --lengths 2K".split(), *argv.split())
    assert f"--cuda-graph-impl {flags}" in line


def test_commands_of_selective_recompute(capsys):
    argv = "--attentions lightning --lengths 2K --recompute".split()
    for modules, flags in (
        ("core_attn,qkv,mlp", "core_attn mlp --lightning-recompute-qkv"),
        ("core_attn", "core_attn"),
    ):
        (line,) = commands(capsys, *argv, modules)
        assert (
            f"--recompute-granularity selective --recompute-modules {flags} --transformer-impl local --mock-data"
            in line
        )


@pytest.mark.parametrize(
    "argv",
    ["--steps 2", "--data x", "--data x --tokenizer y --mock-data", "--profile --no-in-process"],
)
def test_options_that_cannot_work(argv, capsys):
    with pytest.raises(SystemExit):
        training.parse(argv.split())
    assert "give" in capsys.readouterr().err.splitlines()[-1]


def test_equal_tokens():
    options = training.parse([])
    for length in options.lengths:
        micro, whole = training_models.batch(length, options)
        assert whole % micro == 0
        assert micro * length == max(length, 32768) or length == 81920
        exact = length & (length - 1) == 0
        assert whole * length == pytest.approx(262144, rel=0 if exact else 0.08), length


def test_operations_by_hand():
    model = training_models.MODELS["0.4B"]
    assert model.matrices("lightning") == 24 * (5 * 1024**2 + 3 * 1024 * 2816) + 1024 * 32000 == 366_215_168
    assert model.flops("lightning", 1024) == model.flops("lightning", 94208) == 2_235_039_744
    assert model.flops("softmax", 8192) == 6 * 341_049_344 + 24 * 6 * 8192 * 1024 == 3_254_255_616
    assert [training_models.MODELS[name].softmax_layers("hybrid") for name in ("toy", "0.4B", "1B", "3B")] == [
        1,
        3,
        2,
        4,
    ]


@pytest.mark.parametrize("name", training_models.MODELS)
def test_operations_by_megatron(name):
    """Attention layers as lightning_megatron.patches.flops counts them, less what its chunks of 64 add to the least."""
    model, length = training_models.MODELS[name], 4096
    args = SimpleNamespace(
        hidden_size=model.hidden, num_attention_heads=model.heads, kv_channels=model.hidden // model.heads,
        group_query_attention=True, num_query_groups=model.kv_heads, attention_output_gate=False,
    )  # fmt: skip
    options = LightningOptions(num_kv_heads=model.kv_heads)
    rest = 6 * model.hidden * (3 * model.layers * model.ffn + model.vocabulary)
    lightning = megatron_flops.lightning_layer_flops(args, options, 1) - 6 * model.hidden * 64
    softmax = megatron_flops.softmax_layer_flops(args, 1, length)
    assert model.flops("lightning", length) - rest == model.layers * lightning
    assert model.flops("softmax", length) - rest == model.layers * softmax


def row(attention: str, length: int, speed: float | None, **other) -> dict:
    found = {"model": "0.4B", "attention": attention, "length": length, "recompute": "none", "tensor_parallel": 1}
    found |= {"context_parallel": 1, "data_parallel": 1, "cuda_graph": False, "loss_chunk": 0, "extra": ""}
    return found | ({"tokens_per_second": speed} if speed else {}) | other


def test_table():
    rows = [
        row("lightning", n, speed) for n, speed in ((1024, 50_000), (2048, 99_000), (4096, 101_000), (8192, 100_000))
    ]
    rows += [row("softmax", 2048, 90_000), row("softmax", 4096, None, error=training.NO_MEMORY)]
    rows += [row("softmax", 8192, None, error="exit status 1")]
    lines = training.table(rows).splitlines()
    assert [line.split()[-4:] for line in lines[:4]] == [
        ["1K", "2K", "4K", "8K"],
        ["50,000", "99,000", "101,000", "100,000"],
        ["-", "1.10", "-", "-"],
        ["90,000", "no", "mem", "failed"],
    ]
    assert lines[4] == "0.4B lightning: (max - min) / mean from 2K up 2.0%"


def test_table_of_memory_and_idle_time():
    rows = [
        row("lightning", 2048, 100, peak_gib=9.25, profile={"idle": 0.5}, recompute=how)
        for how in ("none", "core_attn")
    ]
    rows.append(row("lightning", 2048, 150, peak_gib=9.25, cuda_graph="local:attn"))
    assert [line.split() for line in training.table(rows).splitlines()[2:]] == [
        ["peak", "GiB", "9.2"],
        ["GPU", "idle", "50%"],
        ["0.4B", "lightning,", "recompute", "core_attn", "100"],
        ["peak", "GiB", "9.2"],
        ["GPU", "idle", "50%"],
        ["0.4B", "lightning,", "CUDA", "graph", "local:attn", "150"],
        ["peak", "GiB", "9.2"],
    ]


def test_row_of_megatrons_log():
    log = "".join(
        f" [2026] iteration {i:8d}/       5 | consumed samples: 8 | elapsed time per iteration (ms): {ms} "
        f"| learning rate: 1 | lm loss: {10 - i / 10:.6E} | loss scale: 1.0 |\n"
        f"[Rank 0] memory (MB) | allocated: 1 | max allocated: {1024 * i}.0\n"
        for i, ms in enumerate((9000.0, 5000.0, 1100.0, 1000.0, 1200.0), 1)
    )
    raw = training.from_log(log + " > padded vocab (size: 31999) with 1 dummy tokens (new size: 32000)\n", 8192)
    found = training.finish(raw, "0.4B", "lightning", training.parse([]))
    assert found["tokens_per_second"] == pytest.approx(262144 / 1.1) and found["ms_per_step"] == pytest.approx(1100)
    assert found["mfu"] == pytest.approx(262144 / 1.1 * 2_235_039_744 / 989e12)
    assert (found["peak_gib"], found["loss"], raw["vocabulary"]) == (5.0, 9.5, 32000)


def sweep(monkeypatch, script: str) -> list[dict]:
    """Rows of a sweep over four lengths whose processes run ``script``, which knows ``cells`` and can ``write``."""
    start = """if True:
        import json, sys
        cells, rows = json.loads(sys.argv[1])
        def write(length, **other):
            values = {"length": length, "seconds": [1.0], "losses": [1.0], "peak_gib": 1.0, "vocabulary": 512}
            open(rows, "a").write(json.dumps(values | other) + "\\n")\n"""

    def command(name, attention, lengths, options, rows):
        return [sys.executable, "-c", start + "    " * 2 + script, json.dumps([lengths, rows])]

    monkeypatch.setattr(training, "command", command)
    return list(training.sweep("toy", "lightning", training.parse("--cpu --lengths 512 64 128 256".split())))


def test_out_of_memory_ends_a_sweep(monkeypatch):
    rows = sweep(monkeypatch, "write(64); write(128); sys.exit('torch.OutOfMemoryError: CUDA out of memory.')")
    assert [x.get("error") for x in rows] == [None, None, training.NO_MEMORY, training.NO_MEMORY]
    assert [x["length"] for x in rows] == [64, 128, 256, 512]


def test_other_failures_cost_one_length(monkeypatch, capsys):
    rows = sweep(monkeypatch, "[write(n) if n != 128 else sys.exit('ValueError: broken') for n in cells]")
    assert [x.get("error") for x in rows] == [None, "exit status 1, ValueError: broken", None, None]
    assert capsys.readouterr().out.count("\nValueError: broken\n") == 1


def test_wrong_batches_and_losses_are_no_result(monkeypatch):
    rows = sweep(
        monkeypatch, "write(64, batches={'1x64': 1}); write(128, losses=[float('nan')]); write(256); write(512)"
    )
    assert [x.get("error", "fine")[:13] for x in rows] == ["the model got", "losses [nan]", "fine", "fine"]


def test_profile_of_overlapping_kernels():
    def event(name, start, end, device="gpu", annotation=False):
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(
            name=name, device_type=device, cpu_parent=None, time_range=span, is_user_annotation=annotation
        )

    events = [event("b", 2000, 5000), event("a", 0, 4000), event("a", 9000, 10000), event("host", 0, 9, "cpu")]
    found = summarize([*events, event("range", 0, 10000, annotation=True)], "gpu", steps=2, seconds=0.004)
    assert found["launches"] == 1.5 and found["idle"] == pytest.approx(0.25)
    assert found["kernels"][0] == {"name": "a", "ms": 2.5, "percent": pytest.approx(62.5), "calls": 1.0}


@pytest.mark.parametrize(
    "attention, kinds",
    [("hybrid", {"LightningAttention": 1, "DynamicSelfAttention": 1}), ("softmax", {"DynamicSelfAttention": 2})],
)
def test_process_trains_as_pretrain_does(attention, kinds, tmp_path):
    """At the first length with the losses of a plain pretrain(), then at another length in the same process."""
    options = training.parse([*TOY, "--attentions", attention])
    line = training_models.command("toy", attention, options.lengths, options, str(tmp_path / "rows"))
    flags = line[line.index("tests.benchmarks.training_run") + 1 :] + ["--num-workers", "0"]
    run_pretrain(flags, module="tests.benchmarks.training_run")
    raw = [json.loads(text) for text in (tmp_path / "rows").read_text().splitlines()]
    rows = [training.finish(x, "toy", attention, options) for x in raw]
    assert [x["length"] for x in rows] == [64, 96] and not any("error" in x for x in rows), rows
    assert all(x["sizes"] == {"parameters": x["sizes"]["parameters"], **kinds} for x in rows)
    assert [x["batches"] for x in raw] == [{"3x64": 6}, {"2x96": 6}]
    assert all(math.isfinite(x["tokens_per_second"]) and len(x["seconds"]) == 1 for x in rows)
    if attention == "hybrid":
        plain = run_pretrain(flags[1:])
        assert plain.losses == pytest.approx(raw[0]["losses"], abs=PRINTED_LOSS)
    assert torch.tensor(raw[1]["losses"]).isfinite().all()
