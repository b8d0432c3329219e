"""The benchmarks without a GPU: registry, floors, every suite on tiny shapes with another clock, files and plots."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_megatron.ops import lightning_attn
from tests.checkout import python_path

from .benchmarks import attention, decode_ops, host, measure, peers, report
from .benchmarks.measure import Shape

# B,T,H,K,V,Hkv; MB (10^6 bytes) of the least traffic forward and backward. By hand: a tensor of 1,8192,32 heads of 128
# in bf16 is 8192 * 32 * 128 * 2 = 67.108864 MB; forward moves 4 of them, backward 7.
FLOORS = [
    ((1, 2048, 32, 128, 128, None), 4 * 16.777216, 7 * 16.777216),
    ((1, 8192, 8, 128, 128, None), 4 * 16.777216, 7 * 16.777216),
    ((1, 8192, 32, 128, 128, None), 4 * 67.108864, 7 * 67.108864),
    ((8, 2048, 32, 128, 128, None), 4 * 134.217728, 7 * 134.217728),
    ((1, 32768, 32, 128, 128, None), 4 * 268.435456, 7 * 268.435456),
    ((1, 131072, 16, 128, 128, None), 4 * 536.870912, 7 * 536.870912),
    # q, k are 16384 * 16 * 128 * 2 bytes = 67.108864 MB, v, o half of it: q k v o; q k v do dq dk dv
    ((1, 16384, 16, 128, 64, None), 3 * 67.108864, 5.5 * 67.108864),
    ((1, 16384, 16, 64, 128, None), 3 * 67.108864, 5 * 67.108864),
    # q, o 134.217728 MB, k and v an eighth of it
    ((1, 16384, 32, 128, 128, 4), 2.25 * 134.217728, 3.5 * 134.217728),
]


@pytest.mark.parametrize("sizes,forward,backward", FLOORS, ids=str)
def test_floors_are_those_computed_by_hand(sizes, forward, backward):
    shape = Shape(*sizes)
    assert shape.forward_bytes() == round(forward * 1e6)
    assert shape.backward_bytes() == round(backward * 1e6)


def test_floor_time_and_state():
    # 1,8192,32 at 3017 GB/s is 0.089 ms forward, 0.156 ms backward
    shape = Shape(1, 8192, 32)
    assert measure.floor_ms(shape.forward_bytes(), 3017) == pytest.approx(0.0890, abs=5e-5)
    assert measure.floor_ms(shape.backward_bytes(), 3017) == pytest.approx(0.1557, abs=5e-5)
    assert Shape(256, 1, 16).state_bytes() == 256 * 2**20  # 16 heads of 128 * 128 fp32 are 1 MiB


def test_registry_is_complete():
    names = [row.name for row in peers.ROWS]
    assert names == [
        "lightning", "fla chunk", "fla fused", "fla recurrent", "lightning-attn2", "lightning-attn2 parallel", "linghe",
        "mamba-2 ssd 256", "mamba-2 ssd 128", "sglang seg_la", "sdpa flash", "sdpa cudnn",
    ]  # fmt: skip
    assert len({row.colour for row in peers.ROWS}) == len(names)
    assert set(attention.SUITES) == set(peers.EVERY_SUITE) == set(report.COLUMNS)
    assert all(row.pip and set(row.suites) <= set(peers.EVERY_SUITE) for row in peers.ROWS)
    assert [row.name for row in peers.ROWS if not row.backward] == ["linghe", "sglang seg_la"]
    for suite in attention.SUITES:
        assert peers.choose(suite)[0].name == "lightning"
        assert not any(row.is_fla for row in peers.choose(suite, autotune=False))


def test_missing_peer_names_its_package():
    row = dataclasses.replace(peers.ROWS[1], module="surely_not_installed")
    assert row.why_missing() == (
        "fla chunk: skipped, package surely_not_installed is not installed; pip install flash-linear-attention"
    )


def test_unknown_suite_is_an_error_that_names_the_suites(capsys):
    with pytest.raises(SystemExit):
        attention.parse_args(["--suite", "sped"])
    message = capsys.readouterr().err
    assert "'sped'" in message and all(suite in message for suite in [*attention.SUITES, "all"])
    assert attention.parse_args([]).suite == ["speed"]
    assert attention.parse_args(["--suite", "all"]).suite == list(attention.SUITES)


def test_documents_fill_the_sequence():
    for spread in ("uniform", "logarithmic"):
        lengths = attention.documents(65536, spread)
        assert sum(lengths) == 65536 and 1 <= min(lengths) and max(lengths) <= attention.LONGEST and len(lengths) > 2


def _stand_in(row: peers.Row) -> peers.Row:
    """The row with our operator behind it, in its own layout."""

    def attn(q, k, v, log_decay, **features):
        if row.layout == peers.BTHD:
            return lightning_attn(q, k, v, log_decay, **features)
        o, final = lightning_attn(*(x.transpose(1, 2) for x in (q, k, v)), log_decay, **features)
        return o.transpose(1, 2), final

    return dataclasses.replace(row, load=lambda: attn)


@pytest.fixture
def on_cpu(monkeypatch):
    """Every suite runs on tiny shapes, every implementation is ours, and every call takes 2 ms."""

    def clock(calls, repeats):
        for call in calls:
            call()
        return measure.Timing(2.0, repeats, False)

    def small(shape):
        return Shape(min(shape.B, 2), min(shape.T, 70), 2, shape.K // 4, shape.V // 4, shape.Hkv and min(shape.Hkv, 2))

    for name, value in {
        "DEVICE": "cpu", "gpu_time": clock, "copies_beyond_cache": lambda footprint: 2,
        "copy_bandwidth": lambda: 3000.0,
        "eager_ms": lambda calls, repeats: clock(calls, repeats).ms, "graph_ms": lambda calls, repeats: 1.0,
        "extra_bytes": lambda attn, q, k, v, do: torch.autograd.grad(attn(q, k, v), (q, k, v), do)[0].numel(),
    }.items():  # fmt: skip
        monkeypatch.setattr(measure, name, value)
    for name in ("SPEED", "SMALL", "DIMS", "HEADS", "GROUPED", "DECODE", "MEMORY", "ERROR"):
        monkeypatch.setattr(attention, name, [small(shape) for shape in getattr(attention, name)[-2:]])
    monkeypatch.setattr(attention, "LENGTHS", [Shape(1, 70, 2, 16, 16)])
    monkeypatch.setattr(attention, "PACKED", Shape(1, 90, 2, 16, 16))
    monkeypatch.setattr(attention, "LONGEST", 30)
    monkeypatch.setattr(attention, "_installed", lambda row: True)
    monkeypatch.setattr(peers, "ROWS", tuple(map(_stand_in, peers.ROWS)))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.parametrize("suite", attention.SUITES)
def test_suite(suite, on_cpu):
    bench = attention.Bench("alibi", 1, False, None, 3000.0)
    rows = [x for group in attention.SUITES[suite](bench) for x in group]
    assert {x["impl"] for x in rows} == {row.name for row in peers.choose(suite)}
    for x in rows:
        assert "failed" not in x, x
        text = report.line(suite, x)
        assert text.startswith(x["impl"])
        shown = [key for key in report.COLUMNS[suite].split() if key not in x and key not in ("shape", "kv")]
        if x["impl"] == "lightning" and suite in ("dims", "packed", "memory", "error"):
            assert not shown, f"no value for {shown}"
    if suite == "error":  # the same operator behind both rows, in bf16
        assert all(0 < x[name] < 1e-2 for x in rows for name in ("o", "dq", "dk", "dv"))


def test_main_writes_a_file_per_suite(on_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no card")
    attention.main(["--suite", "grouped", "memory", "--only", "lightning", "--decay", "zero", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grouped-zero.json", "memory-zero.json"]
    about = json.loads((tmp_path / "memory-zero.json").read_text())["environment"]
    assert about["card"] == "no card" and about["torch"] == torch.__version__ and about["copy_gb_per_s"] == 3000
    assert set(about["packages"]) == {"lightning_megatron"} and about["decay"] == "zero"
    assert "extra MiB" in capsys.readouterr().out


# In a process without Triton's interpreter, on an H100 that is not there: it has a target, and launches do nothing.
PRECOMPILE = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget

from lightning_megatron.ops import lightning_attn
from tests.benchmarks import attention, measure, peers, precompile

nothing = lambda *args, **kwargs: None
properties = dict(max_shared_mem=232448, max_num_regs=65536, warpSize=32)
utils = SimpleNamespace(get_device_properties=lambda device: properties, load_binary=lambda *args: (1, 1, 0, 0, 1024))
triton.runtime.driver.set_active(SimpleNamespace(
    utils=utils, launcher_cls=lambda *args: nothing, get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0, get_current_stream=lambda device: 0,
))


@triton.autotune([triton.Config(dict(N=N)) for N in (16, 32, 64)], key=[])
@triton.jit
def fill_kernel(x, N: tl.constexpr):
    tl.store(x + tl.arange(0, N), 1)


def tuned(q, k, v, log_decay, **features):
    fill_kernel[(1,)](v)
    return v, None


attention.DECODE = attention.DECODE[:1]
attention.MEMORY = [measure.Shape(1, 4096, 2, 64, 64)]
peers.ROWS = (peers.ROWS[0], peers.Row("tuned", "torch", "torch", lambda: tuned, ("decode",), "", autotunes=True))
claims = Path(sys.argv[1])
assert precompile.compile_all(["decode", "memory"], None, False, claims) == []
compiled = len(list(claims.iterdir()))


def forbidden(**details):
    raise AssertionError(f"not compiled: {details['repr']}")


kept = ("check_values", "choose_implementation", "has_copy_engine", "has_wgmma", "check_shapes")
for target, name, value in precompile._replacements(claims):
    if name in kept:
        setattr(target, name, value)
triton.knobs.runtime.jit_cache_hook = forbidden
measure.DEVICE = "cpu"
q, k, v, do = measure.random_inputs(attention.MEMORY[0], peers.BTHD, grad=True)
lightning_attn(q, k, v, -torch.rand(2))[0].backward(do)
q, k, v, _ = measure.random_inputs(attention.DECODE[0], peers.BTHD, grad=False)
lightning_attn(q, k, v, -torch.rand(16), initial_state=torch.empty(1, 16, 128, 128), output_final_state=True)
fill_kernel.do_bench = lambda call, quantiles: call() or [1.0] * 3
fill_kernel[(1,)](v)
print("compiled", compiled)
"""


def test_precompile_compiles_what_is_launched(tmp_path):
    (tmp_path / "script.py").write_text(PRECOMPILE)
    (tmp_path / "claims").mkdir()
    root = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": python_path()}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "claims")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    # three configurations, a step, and of a long sequence states forward and backward, o and the gradients
    assert run.stdout.split() == ["compiled", "8"]


def test_shapes_do_not_share_what_was_tuned(monkeypatch):
    from triton.runtime import Autotuner

    tuner = Autotuner(lambda: None, [], [], [], None, None)
    monkeypatch.setattr(peers, "_tuners", lambda: [tuner])
    peers.tune_for(1, 2048)
    tuner.cache["key"] = "choice"
    peers.tune_for(1, 4096)
    assert not tuner.cache
    peers.tune_for(1, 2048)
    assert tuner.cache == {"key": "choice"}


@pytest.mark.parametrize("name", ["sdpa flash", "sdpa cudnn"])
def test_softmax_kernels_have_a_backward(name):
    attn = next(row for row in peers.ROWS if row.name == name).load()
    q, k, v = (torch.empty(1, 2, 256, 128, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    o, _ = attn(q, k, v, None)
    assert name.split()[1] in type(o.grad_fn).__name__.lower()
    assert [x.shape for x in torch.autograd.grad(o, (q, k, v), o.detach())] == [q.shape] * 3


def test_host_time_is_counted_in_adds(monkeypatch):
    """Of the operator and of what torch needs around it, in the order of their work."""
    monkeypatch.setattr(measure, "DEVICE", "cpu")
    monkeypatch.setattr(host, "ROUNDS", 3)
    waits = []
    ours, nothing = host.operator(Shape(1, 64, 2, 16, 16), lambda: waits.append(None))
    assert len(waits) == 2 * (3 + 3)
    for row in (ours, nothing):
        assert row["forward_adds"] == row["forward_us"] / row["add_us"] > 1
        assert host.line(row).startswith(row["what"]) and f"{row['backward_adds']:.1f} adds" in host.line(row)
    assert ours["forward_us"] > nothing["forward_us"] and ours["backward_us"] > nothing["backward_us"]


def test_failure_is_a_row(on_cpu):
    def measure_nothing(bench, row, shape):
        raise RuntimeError("no luck\nand more")

    x = attention.attempt(measure_nothing, None, peers.ROWS[0], Shape(1, 64, 2))
    assert x["failed"] == "RuntimeError: no luck"
    assert "FAILED: RuntimeError: no luck" in report.line("speed", x)


def test_speedup_is_against_the_faster_fla_row():
    group = [{"impl": "lightning", "forward_ms": 0.5}, {"impl": "fla chunk", "forward_ms": 1.0}]
    group.append({"impl": "fla fused", "forward_ms": 2.0})
    assert [x["forward_speedup"] for x in attention.add_speedups(group)] == [2.0, 1.0, 0.5]


def test_results_to_plots(tmp_path):
    pytest.importorskip("matplotlib")
    plot = importlib.import_module(".benchmarks.plot", __package__)
    rows = [
        {"impl": row.name, **shape.columns(), "forward_ms": 1.0, "both_ms": 2.0}
        | ({} if row.softmax else {"forward_floor": 70.0, "backward_floor": 50.0})
        for shape in (Shape(1, 2048, 32), Shape(1, 8192, 32, 64, 64))
        for row in peers.choose("speed")
    ]
    rows.append({"impl": "linghe", **Shape(1, 32768, 32).columns(), "failed": "out of memory"})
    assert plot.draw_all(tmp_path) == []
    for suite in ("speed", "length", "dims"):
        report.write(tmp_path / f"{suite}.json", {"card": "none", "decay": "zero"}, suite, rows)
        assert json.loads((tmp_path / f"{suite}.json").read_text())["rows"] == rows
    way = {"model": "0.4B", "recompute": "none", "tensor_parallel": 1, "context_parallel": 2, "data_parallel": 1}
    way |= {"cuda_graph": False, "loss_chunk": 0, "extra": ""}
    training = [
        way | {"attention": name, "length": length, "tokens_per_second": 1e5}
        for name in ("lightning", "softmax", "something else")
        for length in (2048, 4096, 8192)
    ]
    (tmp_path / "training.json").write_text(json.dumps({"rows": training}))
    drawn = plot.draw_all(tmp_path)
    assert sorted(path.name for path in drawn) == ["dims.png", "length.png", "speed.png", "training.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


WAY = {"recompute": "none", "tensor_parallel": 1, "context_parallel": 1, "data_parallel": 1, "cuda_graph": False}
WAY |= {"loss_chunk": 0, "extra": ""}


def training_rows(model: str, attention: str, speeds: dict[int, float | None], **way) -> list[dict]:
    row = {"model": model, "attention": attention, **WAY, **way}
    return [row | {"length": n} | ({"tokens_per_second": y} if y else {"failed": "?"}) for n, y in speeds.items()]


def test_training_plot_has_a_panel_per_model_with_all_its_lines(tmp_path, monkeypatch):
    plot = importlib.import_module(".benchmarks.plot", __package__)
    rows = training_rows("0.4B", "lightning", {4096: 3.0, 1024: 1.0, 2048: None, 8192: 4.0})  # one run failed
    rows += training_rows("0.4B", "softmax", {1024: 1.0, 2048: 2.0, 4096: 3.0}, recompute="full", loss_chunk=8192)
    rows += training_rows("0.4B", "hybrid", {1024: 1.0, 2048: 2.0, 4096: None})  # two points
    rows += training_rows("1B", "lightning", {1024: 5.0, 2048: 6.0, 4096: 7.0})
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    plot.draw_training({"rows": rows}, tmp_path / "training.png")
    panels = {axis.get_title(): axis.get_lines() for axis in figures[0].axes}
    assert {title: len(lines) for title, lines in panels.items()} == {"0.4B parameters": 2, "1B parameters": 1}
    lightning, softmax = panels["0.4B parameters"]
    assert list(lightning.get_xdata()) == [1024, 2048, 4096, 8192]
    assert [y for y in lightning.get_ydata() if y == y] == [1, 3, 4] and lightning.get_ydata()[1] != 1  # a gap
    assert lightning.get_color() != softmax.get_color() and lightning.get_linestyle() != softmax.get_linestyle()
    (other,) = panels["1B parameters"]
    assert (other.get_color(), other.get_linestyle()) == (lightning.get_color(), lightning.get_linestyle())
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["lightning", "softmax", "nothing recomputed", "full recompute, loss chunks of 8K"]


@pytest.mark.parametrize("sweep", [False, True])
def test_decoding_operators(sweep, on_cpu, monkeypatch, tmp_path, capsys):
    """On a CPU with tiny heads: all rows that need no other package compute the same, and land in table and file."""

    def graph_ms(calls, repeats):
        for call in calls:
            call()
        return 0.001

    monkeypatch.setattr(measure, "graph_ms", graph_ms)
    monkeypatch.setattr(decode_ops, "DIM", 16)
    path = tmp_path / "new" / "decode_ops.json"
    arguments = ["--heads", "2", "--requests", "1", "3", "--out", str(path), *(["--sweep"] if sweep else [])]
    decode_ops.main(arguments)
    rows = json.loads(path.read_text())["rows"]
    ours = [x for x in rows if "skipped" not in x]
    assert not [x for x in ours if "failed" in x] and capsys.readouterr().out.count("\n") == len(rows) + 3
    if sweep:
        assert len(rows) == 2 * sum(map(len, decode_ops.TILES.values()))
        return
    assert {x["impl"] for x in rows} == set(decode_ops.ROWS)
    assert len(ours) >= 2 * 6 and all(0 < x["error"] < 2e-2 for x in ours)
    (one,) = [x for x in ours if x["impl"] == "step" and x["R"] == 3]
    # in a microsecond: 2 heads of 3 requests, 1 KiB each read and written, and 4 tensors of 32 bytes a head
    assert one["gb_per_s"] == pytest.approx(6 * (2 * 1024 + 4 * 32) * 1e-3)


def test_a_failing_peer_is_a_row(on_cpu, monkeypatch):
    monkeypatch.setattr(decode_ops, "DIM", 16)
    cases = decode_ops.make_cases(2, 2)
    row = decode_ops.attempt("step", lambda: lambda c: decode_ops.step(c) + 1, cases, 3000.0, 1)
    assert "computes something else" in row["failed"] and "FAILED" in decode_ops.line(row)
