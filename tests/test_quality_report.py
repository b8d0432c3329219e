"""The comparison of qualities: the report of any part of its runs, against values by hand."""

import json
import math
import shutil
from pathlib import Path

from examples.quality import plots, report, results, variants


def a_run(variant: str = "softmax", tokens: float = 1e8, seed: int = 1, nll: float | None = 2.5, **changes) -> dict:
    """What results/NAME.json holds of a complete run of 100 steps of 2 s."""
    rows = [{"length": 128, "depth": x, "exact": x, "gain": 1 + x, "cases": 2} for x in (0.0, 1.0)]
    tasks = {
        "loss": {"nll": nll, "by_position": [3.0, 2.0], "length": 4096},
        "context": {"rows": [{"multiple": 1, "perplexity": 12.0}, {"multiple": 64}]},
        "recall": {"rows": [{"pairs": 8, "accuracy": 0.5, "among": 0.75}]},
        "needle": {"rows": rows},
        "copy": {"rows": [{"distance": 256, "exact": 0.25, "gain": 2.0}]},
    }
    run = {
        "variant": variant, "size": "base", "seed": seed, "lr": 1e-3, "tag": "", "tokens": tokens, "steps": 100,
        "parameters": 137_000_000, "losses": [4.0 - i / 50 for i in range(100)], "seconds": [9.0] + [2.0] * 99,
        "valid": [{"iteration": 100, "valid_loss": 2.1}], "data": "0",
        "stretches": [{"card": "H200", "commit": "abc", "wall_seconds": 240.0}],
        "tasks": {} if nll is None else {name: task | {"seconds": 12.0} for name, task in tasks.items()},
    } | changes  # fmt: skip
    return run | {"seconds": run["seconds"][: len(run["losses"])]}


def made(folder: Path, *runs: dict) -> str:
    """The page of these runs."""
    folder.mkdir()
    for number, run in enumerate(runs):
        (folder / f"run{number}.json").write_text(json.dumps(run))
    page = folder.parent / "quality.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    return report.write(folder, page, variants.Plan("base", 1e8, 1e7, "base-32k", 1e6))


def state(**changes) -> str:
    return results.Run("x", a_run(**changes)).state


def test_runs_that_diverged_are_told():
    assert state() == "complete" and state(steps=200) == "stopped at 100 of 200"
    assert state(valid=[{"iteration": 50, "valid_loss": 0.9}]) == "diverged"
    assert state(losses=[2.0, None]) == "diverged at step 2" and state(losses=[], steps=9) == "no step"


def test_page_of_one_run_names_all_that_is_missing(tmp_path: Path):
    text = made(tmp_path / "results", a_run("7:1", nll=None, steps=200), a_run("1:1", losses=[2.0, None]))
    assert (
        "`softmax` with 100M tokens is missing" in text
        and "Missing, of 29 runs of the plan, 29: `lightning` base" in text
    )
    assert "stopped at 100 of 200" in text and "diverged at step 2" in text and "loss.png" in text
    assert text.count("| `softmax` | missing |") >= 1 and "recall.png" not in text
    text = made(tmp_path / "more", a_run("lightning"), a_run("softmax"))
    assert "Missing, of 29 runs of the plan, 27:" in text and "needle.png" in text


def test_loss_at_equal_time_by_hand(tmp_path: Path):
    """Lightning is twice as fast at 4K, ten times at 32K; softmax loses 0.1 nats for each tenth of the tokens."""
    slow, long = {"seconds": [4.0] * 100}, {"size": "base-32k", "nll": None, "tokens": 1e6}
    text = made(
        tmp_path / "results", a_run("lightning", nll=2.6), a_run("softmax", nll=2.5, **slow),
        a_run("softmax", nll=2.4, seed=2, **slow), a_run("softmax", tokens=1e7, nll=2.55, **slow),
        a_run("lightning", **long), a_run("softmax", **long, seconds=[20.0] * 100),
    )  # fmt: skip
    then = 2.45 + 0.1 * math.log10(2)
    row = f"| `softmax` | 2.4500 ± 0.0500 | 250,000 | 50M | {then:.4f} | 500 | 10M | 2.5500 |"
    assert row in text and "| `lightning` | 2.6000 | 500,000 | 100M | 2.6000 | 5,000 | 100M | 2.6000 |" in text
    assert "- `lightning`, worse: held-out loss 2.6000 (2.4500)." in text
    assert "one seed" in text and "| `3:1` | missing | missing" in text
    assert "perplexity at 1x 12.00 (12.00)" in text.split("no difference beyond the seeds'")[1]


def test_tables_by_hand(tmp_path: Path):
    other = a_run("lightning,decay=none", tokens=1e7, nll=2.75)
    text = made(
        tmp_path / "results", a_run("softmax"), other, a_run("lightning", tokens=1e7, nll=2.7),
        a_run("lightning", tokens=1e7, nll=2.6, lr=4e-3, valid=[{"iteration": 100, "valid_loss": 2.2}]),
    )  # fmt: skip
    # beside the learning rate that validated better, whatever the held-out windows say of both
    assert "| `lightning,decay=none` | 0.001 | 2.7500 | +0.0500 |" in text
    assert "| `lightning,gate=none` | missing | missing | missing |" in text
    assert "| `lightning` | 2.1000 | 2.2000 |" in text and "| validation loss | 0.001 | 0.004 |" in text
    assert "| `softmax` | 50% |" in text and "| `softmax` | 1.50 |" in text  # needles: means over depths
    assert "| `softmax` | 1.00 | 2.00 |" in text and "| `softmax` | 12.00 | missing |" in text
    assert "| 137.00M | 2.5000 | 2.0600 | 5.0 | 500,000 | complete | H200 | abc |" in text
    for name in ("loss", "recall", "needle"):
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 10_000


def test_title_of_a_plot_names_tokens_parameters_seeds_card():
    runs = [results.Run("a", a_run()), results.Run("b", a_run("7:1", seed=2, parameters=138_000_000))]
    assert plots.title_of(runs) == "100M tokens, 137.0M to 138.0M parameters, seeds 1, 2, H200"


def test_page_without_results_says_so(tmp_path: Path):
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.write(tmp_path / "results", page) == report.NOTHING
    assert page.read_text() == f"before\n{report.BEGIN}\n\n{report.NOTHING}\n\n{report.END}\nafter\n"


def test_page_is_that_of_the_committed_results(tmp_path: Path):
    page = tmp_path / "docs" / "quality.md"
    page.parent.mkdir()
    text = (report.ROOT / "docs" / "quality.md").read_text("utf-8")
    page.write_text(text)
    copied = tmp_path / "examples" / "quality" / "results"
    if report.RESULTS.is_dir():
        shutil.copytree(report.RESULTS, copied)
    report.write(copied, page)
    assert page.read_text("utf-8") == text, "run python -m examples.quality.report write"
