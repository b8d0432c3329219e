"""The comparison of qualities: the report of any part of its runs, against values by hand."""

import json
import math
import shutil
from pathlib import Path

import pytest

from examples.quality import picks, plots, report, results, variants


def a_run(variant: str = "softmax", tokens: float = 1e8, seed: int = 1, nll: float | None = 2.5, **changes) -> dict:
    """What results/NAME.json holds of a complete run of 100 steps of 2 s."""
    rows = [
        {"length": 128, "depth": x, "exact": x, "gain": 1 + x, "cases": 10, "scaled": False} for x in (0.0, 1.0)
    ]  # fmt: skip
    packages = {f"p{i}": {"tokens": 100 * (i + 1), "nll": (nll or 0.0) + (i - 2) / 10} for i in range(4)}
    tasks = {
        "loss": {"nll": nll, "by_position": [3.0, 2.0], "length": 4096, "by_package": packages},
        "context": {
            "rows": [
                {"multiple": 1, "perplexity": 12.0, "scaled": False},
                {"multiple": 4, "perplexity": 30.0, "scaled": False},
                {"multiple": 4, "perplexity": 14.0, "scaled": True},
                {"multiple": 64, "scaled": False},
            ]
        },
        "recall": {
            "rows": [
                {"form": x, "pairs": 8, "accuracy": 0.5, "among": 0.75, "queries": 256} for x in ("adjacent", "lines")
            ]
        },
        "needle": {"rows": rows},
        "copy": {"rows": [{"distance": 256, "exact": 0.25, "gain": 2.0, "cases": 10}]},
    }
    run = {
        "variant": variant, "size": "base", "seed": seed, "lr": 1e-3, "tag": "", "tokens": tokens, "steps": 100,
        "parameters": 137_000_000, "transformer_impl": "transformer_engine",
        "losses": [4.0 - i / 50 for i in range(100)], "seconds": [9.0] + [2.0] * 99,
        "valid": [{"iteration": 100, "valid_loss": 2.1}], "data": "0",
        "stretches": [{"card": "H200", "commit": "abc", "wall_seconds": 240.0}],
        "tasks": {} if nll is None else {name: task | {"seconds": 12.0} for name, task in tasks.items()},
    } | changes  # fmt: skip
    return run | {"seconds": run["seconds"][: len(run["losses"])]}


def made(folder: Path, *runs: dict, readme: Path | None = None) -> str:
    """The page of these runs."""
    folder.mkdir()
    for number, run in enumerate(runs):
        (folder / f"run{number}.json").write_text(json.dumps(run))
    page = folder.parent / "quality.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    return report.write(folder, page, variants.Plan("base", 1e8, 1e7, "base-32k", 1e6), readme)


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take more time than the rest of a page."""
    monkeypatch.setattr(plots, "draw", lambda *_: [])


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
        and "Missing, of 36 runs of the plan, 36: `lightning` base" in text
    )
    assert "stopped at 100 of 200" in text and "diverged at step 2" in text and "loss.png" in text
    assert text.count("| `softmax` | missing |") >= 1 and "recall.png" not in text
    alone = made(tmp_path / "alone", a_run("softmax"))
    assert "Nothing can be compared yet: of 100M tokens only `softmax` was evaluated." in alone
    text = made(tmp_path / "more", a_run("lightning"), a_run("softmax"))
    assert "Missing, of 36 runs of the plan, 34:" in text and "needle.png" in text


@pytest.mark.parametrize("changed", ["none", "loss", "rows", "old"])
def test_page_of_runs_that_are_not_evaluated_whole(tmp_path: Path, changed: str):
    """Complete runs whose evaluation is still to come, lacks the loss, has no row, or knows no packages and forms."""
    tasks = a_run()["tasks"]
    less = {
        "none": {},
        "loss": {name: task for name, task in tasks.items() if name != "loss"},
        "rows": tasks | {name: {"rows": [], "seconds": 1.0} for name in tasks if name != "loss"},
        "old": tasks | {
            "loss": {"nll": 1.5, "by_position": [1.25, 1.25], "length": 4096, "seconds": 1.0},
            "recall": {"rows": [{"pairs": 8, "accuracy": 0.5, "among": 0.75}], "seconds": 1.0},
        },
    }[changed]  # fmt: skip
    text = made(tmp_path / "results", a_run("softmax", tasks=less), a_run("7:1", tasks=less))
    assert "Missing, of 36 runs of the plan, 34:" in text and "1.2500" not in text and "3.49" not in text
    if changed != "rows":
        assert "Nothing can be compared yet: `softmax` with 100M tokens was not evaluated." in text


def test_needles_beyond_the_training_length_stand_in_one_column(tmp_path: Path):
    """There softmax layers are asked with scaled angles only, and lightning layers have no others."""
    tasks = a_run()["tasks"]
    of = lambda scaled: [row | {"scaled": scaled} for row in tasks["needle"]["rows"]]
    runs = [
        a_run(name, tasks=tasks | {"needle": {"rows": of(scaled), "seconds": 1.0}})
        for name, scaled in (("lightning", False), ("softmax", True))
    ]  # fmt: skip
    text = made(tmp_path / "results", *runs)
    part = lambda title: text.split(f"### {title}")[1].split("###")[0]
    found, gained, by_depth = map(part, ("Needle, share found", "Needle, nats gained", "Needle in 128 tokens, nats"))
    assert "| variant | 128 |\n" in found and "needle.png" in text
    for name in ("lightning", "softmax"):
        assert f"| `{name}` | 50% |\n" in found and f"| `{name}` | 1.50 |\n" in gained
        assert f"| `{name}` | 1.00 | 2.00 |\n" in by_depth


def test_a_validation_that_is_no_number_chooses_no_rate(tmp_path: Path, without_plots):
    odd = a_run("softmax", nll=2.9, valid=[{"iteration": 100, "valid_loss": math.nan}])
    text = made(tmp_path / "results", odd, a_run("softmax", nll=2.4, lr=2e-3))
    assert "| `softmax` | 2.4000 | 500,000 |" in text and "| nan |" not in text
    nothing = {key: value for key, value in a_run(losses=[], tasks={}, valid=[]).items() if key != "parameters"}
    assert "0.00M" not in made(tmp_path / "nothing", nothing)


def test_one_package_has_no_standard_error(tmp_path: Path, without_plots):
    def run(variant: str, nll: float, **changes) -> dict:
        loss = a_run(nll=nll)["tasks"]["loss"] | {"by_package": {"p": {"tokens": 9, "nll": nll}}}
        return a_run(variant, tasks={"loss": loss | {"seconds": 1.0}}, **changes)

    text = made(tmp_path / "results", run("softmax", 2.5), run("softmax", 2.51, seed=2), run("7:1", 2.4))
    assert "| `7:1` | 2.4000 | 2.4000 | -0.1050 | 1 of 1 |" in text
    assert "- `7:1`, not judged: held-out loss 2.4000 (2.5050)." in text


def test_loss_at_equal_time_by_hand(tmp_path: Path, without_plots):
    """Lightning is twice as fast at 4K, ten times at 32K; softmax loses 0.1 nats for each tenth of the tokens."""
    slow, long = {"seconds": [4.0] * 100}, {"size": "base-32k", "nll": None, "tokens": 1e6}
    text = made(
        tmp_path / "results", a_run("lightning", nll=2.6), a_run("softmax", nll=2.5, **slow),
        a_run("softmax", nll=2.4, seed=2, **slow), a_run("softmax", tokens=1e7, nll=2.55, **slow),
        a_run("lightning", **long), a_run("softmax", **long, seconds=[20.0] * 100),
    )  # fmt: skip
    then = 2.45 + 0.1 * math.log10(2)
    row = f"| `softmax` | 2.4500 ± 0.0500 | 250,000 | 50M | ≤ {then:.4f} | 500 | 10M | 2.5500 |"
    assert row in text and "| `lightning` | 2.6000 | 500,000 | 100M | 2.6000 | 5,000 | 100M | 2.6000 |" in text
    assert "- `lightning`, worse: held-out loss 2.6000 (2.4500)." in text
    assert "| `3:1` | missing | missing" in text
    assert (
        "perplexity at 1x 12.00 (12.00); perplexity at 4x 14.00 (14.00)" in text.split("`lightning`, within noise")[1]
    )
    more = {"tokens": 5e7, "nll": 2.47} | slow
    text = made(tmp_path / "more", a_run("lightning", nll=2.6), a_run("softmax", **slow), a_run(**more))
    assert "| 250,000 | 50M | 2.4700 |" in text  # of a run with as many tokens
    text = made(tmp_path / "few", a_run("lightning", nll=2.6), a_run(**more), a_run("softmax", seconds=[8.0] * 100))
    assert "| 125,000 | 25M | > 2.4700 |" in text
    text = made(tmp_path / "shared", a_run("softmax", shared=True), a_run("softmax", tokens=1e7, nll=2.55))
    assert "| `softmax` | 2.5000 | 50,000 | 100M |" in text  # of the run that had the GPU to itself


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
    assert "| `softmax` | 50% |\n" in text and "| `softmax` | 1.50 |\n" in text  # needles: means over depths
    assert "| variant | 1x | 4x | 4x, scaled | sliding |" in text
    assert f"| `softmax` | 12.00 | 30.00 | 14.00 | {math.exp(2.0):.2f} |" in text
    assert "| `softmax` | 1.00 | 2.00 |" in text
    assert "| 137.00M | 2.5000 | 2.1000 | 2.0600 | 5.0 | 500,000 | complete | H200 | abc |" in text
    for name in ("loss", "recall", "needle"):
        assert (tmp_path / "results" / f"{name}.png").stat().st_size > 10_000


def test_what_one_run_cannot_tell(tmp_path: Path, without_plots):
    """Without a second seed nothing is judged; with one, the largest distance between seeds is that of all variants; a
    share of few answers, or of too few, is not better for one of them.
    """

    def needles(found: int, cases: int) -> dict:
        rows = [{"length": 128, "depth": 0.5, "exact": found / cases, "gain": 1.0, "cases": cases, "scaled": False}]
        tasks = a_run(nll=2.5)["tasks"]
        return {"tasks": tasks | {"needle": {"rows": rows, "seconds": 1.0}}}

    text = made(tmp_path / "one", a_run("1:1", nll=2.4), a_run("softmax", nll=2.5))
    assert "- `1:1`, not judged: held-out loss 2.4000 (2.5000)" in text and ": nothing." not in text
    runs = [a_run("softmax", nll=2.5), a_run("lightning", nll=2.7), a_run("lightning", nll=2.75, seed=2)]
    text = made(tmp_path / "two", a_run("1:1", nll=2.46), *runs)
    assert "- `1:1`, within noise: held-out loss 2.4600 (2.5000)" in text
    assert "- `1:1`, better: held-out loss 2.4400" in made(tmp_path / "far", a_run("1:1", nll=2.44), *runs)
    for cases, kind in ((20, "within noise"), (10, "not judged"), (2000, "better")):
        found, none = needles(cases // 20, cases), needles(0, cases)
        several = [a_run("softmax", seed=seed, **none) for seed in (1,)] + [
            a_run("lightning", seed=seed, **none) for seed in (1, 2)
        ]
        text = made(tmp_path / f"cases{cases}", a_run("1:1", **found), *several)
        (line,) = (x for x in text.splitlines() if x.startswith("- `1:1`") and "needle in 128" in x)
        assert line.startswith(f"- `1:1`, {kind}:"), line


def test_gap_by_package():
    """Of the same packages, weighted by tokens; its error is that of drawing packages anew."""

    def run(**losses: float) -> results.Run:
        tasks = {"loss": {"by_package": {x: {"tokens": 1 + (x == "a"), "nll": y} for x, y in losses.items()}}}
        return results.Run("x", a_run() | {"tasks": tasks})

    found = picks.gap([run(a=2.0, b=3.0, c=9.0)], [run(a=2.3, b=2.7, d=1.0)])
    assert found.value == pytest.approx((2 * -0.3 + 0.3) / 3) and (found.better, found.packages) == (1, 2)
    assert found.error == pytest.approx(0.21, abs=0.03)  # -0.3, -0.1 twice, 0.3
    two = picks.gap([run(a=1.0, b=2.0), run(a=3.0, b=4.0)], [run(a=2.3, b=2.7)])
    assert two.value == pytest.approx((2 * -0.3 + 0.3) / 3)
    assert picks.gap([results.Run("x", a_run(nll=None))], [run(a=1.0)]) is None


def test_an_ablation_is_compared_at_its_own_rate(tmp_path: Path):
    """The better rate of the base has nothing to do with it; layers of another kind are no base either."""
    other = a_run("lightning,norm=none", tokens=1e7, nll=2.9)
    better = a_run("lightning", tokens=1e7, nll=2.5, lr=2e-3, valid=[{"iteration": 100, "valid_loss": 1.9}])
    text = made(tmp_path / "none", other, better)
    assert "| `lightning,norm=none` | 0.001 | 2.9000 | missing |" in text
    local = a_run("lightning", tokens=1e7, nll=2.8, transformer_impl="local")
    assert "| `lightning,norm=none` | 0.001 | 2.9000 | missing |" in made(tmp_path / "local", other, better, local)
    same = a_run("lightning", tokens=1e7, nll=2.8)
    assert "| `lightning,norm=none` | 0.001 | 2.9000 | +0.1000 |" in made(tmp_path / "same", other, better, same)
    assert "| `softmax,gate` | missing |" in text
    near = {"context": {"rows": [{"multiple": 1, "perplexity": 12.0, "scaled": False}], "seconds": 1.0}}
    text = made(tmp_path / "near", other | {"tasks": other["tasks"] | near}, same)
    assert "| 2.9000 | +0.1000 | missing | 50.0% |" in text and "| +0.0000 | 14.00 | 50.0% |" in text


def test_a_shared_gpu_gives_no_speed():
    assert results.Run("x", a_run()).speed == 500_000 and results.Run("x", a_run(shared=True)).speed is None


def test_title_of_a_plot_names_tokens_parameters_seeds_card():
    runs = [results.Run("a", a_run()), results.Run("b", a_run("7:1", seed=2, parameters=138_000_000))]
    assert plots.title_of(runs) == "100M tokens, 137.0M to 138.0M parameters, seeds 1, 2, H200"


def test_page_without_results_says_so(tmp_path: Path):
    page = tmp_path / "quality.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.write(tmp_path / "results", page) == report.NOTHING
    assert page.read_text() == f"before\n{report.BEGIN}\n\n{report.NOTHING}\n\n{report.END}\nafter\n"


def test_folders_and_files_that_are_not_there(tmp_path: Path, capsys):
    """A page of no results would take the place of the one that is there."""
    page, results_of = tmp_path / "page.md", tmp_path / "results"
    page.write_text(text := f"before\n{report.BEGIN}\nold\n{report.END}\n")
    places = ["--results", str(results_of), "--page", str(page), "--readme"]
    for words, message in (
        (["write", *places, str(page)], f"--results {results_of}: no such folder"),
        (["collect", *places[:2], "--runs", str(tmp_path / "none")], f"--runs {tmp_path / 'none'}: no run there"),
        (["write", "--results", str(tmp_path), *places[2:], str(tmp_path / "none")], "none: no such file; give one"),
    ):
        with pytest.raises(SystemExit) as stop:
            report.main(words)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert page.read_text() == text and not results_of.exists()


def test_pages_are_those_of_the_committed_results(tmp_path: Path):
    names, texts = ("docs/quality.md", "README.md"), {}
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        texts[name] = (report.ROOT / name).read_text("utf-8")
        (tmp_path / name).write_text(texts[name])
    copied = tmp_path / "examples" / "quality" / "results"
    if report.RESULTS.is_dir():
        shutil.copytree(report.RESULTS, copied)
    page, readme = (tmp_path / name for name in names)
    report.write(copied, page, readme=readme)
    for name in names:
        assert (tmp_path / name).read_text("utf-8") == texts[name], "run python -m examples.quality.report write"


def test_short_table_by_hand(tmp_path: Path, without_plots):
    """Of variants that have all of their tokens, in the order of variants.py; means over seeds."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before {report.BEGIN} old {report.END} after")
    runs = [a_run("softmax", shared=True), a_run("lightning", nll=2.7), a_run("lightning", nll=2.6, seed=2)]
    runs.append(a_run("3:1", tokens=1e7))  # too few tokens: no row
    runs.append(a_run("lightning", tokens=1e6, size="base-32k", nll=None, seconds=[4.0] * 100))
    made(tmp_path / "results", *runs, readme=readme)
    table = [
        "| lightning : softmax | held-out loss | perplexity at 4,096 | perplexity at 65,536 | perplexity at 262,144 "
        "| recall of 32 pairs | needle in 4,096 | tokens/s at 4,096 | tokens/s at 32,768 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| `lightning` | 2.650 ± 0.050 | 12.00 ± 0.00 | missing | missing | missing | missing | 500,000 | 2,500 |",
        "| `softmax` | 2.500 | 12.00 | missing | missing | missing | missing | missing | missing |",
    ]
    assert readme.read_text() == "\n".join([f"before {report.BEGIN}", "", *table, "", f"{report.END} after"])
