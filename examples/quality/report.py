"""Tables and plots of docs/quality.md, from the committed JSON files.

    python -m examples.quality.report collect --runs runs           # JSON of runs -> examples/quality/results
    python -m examples.quality.report write                         # results -> docs/quality.md and its plots

``write`` replaces what stands between the two marks in docs/quality.md and, a table of what decides, in README.md.
Nothing is left out of the page: runs of the plan that are not there are missing by name, and those that diverged or are
not complete have their row.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from . import RESULTS, ROOT
from .picks import Pick, gap, keys_of, loss_of, needle_of, of_packages, perplexity_at, row_of, sliding
from .results import FIDELITY, Mean, Results, Run, collect, load, mean, million
from .tasks import FORMS
from .variants import ABLATIONS, FAMILY, MAIN, PLAN, SIZES, TWO_SEEDS, Plan
from .verdicts import verdicts

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
NOTHING = "**Nothing is measured yet.** The pipeline is there and tested on CPUs; no run on a GPU has been committed."
MISSING = "missing"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)] + [""]


def shown(found: Mean | None, form: str = ".4f") -> str:
    return MISSING if found is None else found.text(form)


def by_variant(results: Results, head: list[str], picks: list[Pick], form: str) -> list[str]:
    """A row for every variant, a column for every pick."""
    rows = [[f"`{name}`", *(shown(mean(results.main(name), pick), form) for pick in picks)] for name in MAIN]
    return table(["variant", *head], rows)


# ---- sections --------------------------------------------------------------------------------------------------------


def cost(results: Results) -> list[str]:
    """Loss at equal tokens and at equal time, at both lengths."""
    plan = results.plan
    sizes = (plan.size, plan.long_size)
    speeds = [{name: results.speed(name, size) for name in MAIN} for size in sizes]
    fastest = [max((x for x in found.values() if x), default=None) for found in speeds]
    rows = []
    for name in MAIN:
        loss = mean(results.main(name), loss_of)
        row = [f"`{name}`", shown(loss)]
        for found, most in zip(speeds, fastest, strict=True):
            speed = found[name]
            if speed is None or most is None:
                row += [MISSING, MISSING, MISSING]
                continue
            tokens = plan.tokens * speed / most
            then = results.loss_at(name, tokens)
            row += [f"{speed:,.0f}", million(tokens), MISSING if then is None else f"{then[0]} {then[1]:.4f}".strip()]
        rows.append(row)
    lengths = [SIZES[size].seq_length for size in sizes]
    head = ["variant", f"loss at {million(plan.tokens)} tokens"]
    for length in lengths:
        head += [f"tokens/s at {length:,}", "tokens in the time", "loss then"]
    note = (
        f"Nats per token of held-out packages. *In the time* in which the fastest variant at that length reads "
        f"{million(plan.tokens)} tokens. *Loss then*: of a run with so many tokens; with ≤ on the line between the "
        "variant's next runs over the logarithm of the tokens, each with its own schedule, so that the truth is lower; "
        f"with > that of the shortest run, which had more tokens. All were trained at {lengths[0]:,}; of "
        f"{lengths[1]:,} there is only the speed, and no model."
    )
    return ["### Loss at equal tokens and at equal GPU time", "", *table(head, rows), note, ""]


def positions(results: Results) -> list[str]:
    """A few parts of the window."""
    runs = [run for name in MAIN for run in results.main(name) if loss_of(run) is not None]
    lengths = {run.tasks["loss"]["length"] for run in runs}
    if not lengths:
        return []
    length = min(lengths)
    shares = [0.0, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 63 / 64]

    def at(share: float) -> Pick:
        def pick(run: Run) -> float | None:
            if loss_of(run) is None:
                return None
            parts = run.tasks["loss"]["by_position"]
            return parts[min(len(parts) - 1, int(share * len(parts)))]

        return pick

    head = [f"from {int(share * length):,}" for share in shares]
    return _section(f"Loss by position in the window of {length:,}", results, head, list(map(at, shares)), ".4f")


def packages(results: Results) -> list[str]:
    """Whether a few packages decide."""
    if all(mean(results.main(name), of_packages) is None for name in MAIN):
        return []
    rows = []
    for name in MAIN:
        runs = results.main(name)
        row = [f"`{name}`", shown(mean(runs, loss_of)), shown(mean(runs, of_packages))]
        found = gap(runs, results.main("softmax")) if name != "softmax" else None
        if found is None:
            row += ["-", "-"]
        else:
            error = "" if found.error is None else f" ± {2 * found.error:.4f}"
            row += [f"{found.value:+.4f}{error}", f"{found.better} of {found.packages}"]
        rows.append(row)
    head = ["variant", "all tokens", "packages alike", "beside softmax, ± two standard errors", "packages better"]
    note = "*Packages alike*: every package counts the same. Standard errors: packages drawn anew, 1,000 times."
    return ["### Held-out loss by package", "", *table(head, rows), note, ""]


def contexts(results: Results) -> list[str]:
    runs = [run for name in MAIN for run in results.main(name)]
    picks: list[Pick] = []
    head = []
    for x in keys_of(runs, "context", "multiple"):
        for scaled in (False, True):
            pick = row_of("context", "perplexity", multiple=x, scaled=scaled)
            if any(pick(run) is not None for run in runs):
                head.append(f"{x:g}x" + (", scaled" if scaled else ""))
                picks.append(pick)
    if picks:
        head, picks = [*head, "sliding"], [*picks, sliding]
    title = "Perplexity by context, in multiples of the training length, states carried"
    note = (
        "*Scaled*: softmax layers with angles of a base that grows with the length (NTK-aware). *Sliding*: windows of "
        "the training length that move on by a quarter, which is the last quarter of the loss by position; it is of "
        "other text than the rest of the table."
    )
    return [*_section(title, results, head, picks, ".2f"), *([note, ""] if picks else [])]


def recalls(results: Results) -> list[str]:
    runs = [run for name in MAIN for run in results.main(name)]
    keys = keys_of(runs, "recall", "pairs")
    lines = []
    for form in FORMS:
        picks = [row_of("recall", value, pairs=x, form=form) for x in keys for value in ("accuracy", "among")]
        head = [title for x in keys for title in (f"{x:g} pairs", "among")]
        note = (
            f"Recall of N pairs (MQAR, {form}): share of values that are the likeliest of the vocabulary; *among* the "
            "N values"
        )
        lines += _section(note, results, head, picks, ".1%")
    return lines


def needles(results: Results) -> list[str]:
    """By length, and for each length by depth."""
    runs = [run for name in MAIN for run in results.main(name)]
    lengths, depths = keys_of(runs, "needle", "length"), keys_of(runs, "needle", "depth")
    lines = []
    for value, title, form in (("exact", "share found", ".0%"), ("gain", "nats gained per token of the number", ".2f")):
        picks, head = [needle_of(value, x) for x in lengths], [f"{x:,.0f}" for x in lengths]
        lines += _section(f"Needle, {title}, by length", results, head, picks, form)
    for length in lengths:
        picks = [row_of("needle", "gain", length=length, depth=x) for x in depths]
        title = f"Needle in {length:,.0f} tokens, nats gained, by depth (0 is the beginning)"
        lines += _section(title, results, [f"{x:g}" for x in depths], picks, ".2f")
    return lines


def copies(results: Results) -> list[str]:
    runs = [run for name in MAIN for run in results.main(name)]
    keys = keys_of(runs, "copy", "distance")
    picks = [row_of("copy", value, distance=x) for x in keys for value in ("exact", "gain")]
    head = [title for x in keys for title in (f"{x:,.0f} tokens", "nats gained")]
    return _section("Copy of an identifier: share right as a whole, by distance", results, head, picks, ".2f")


def _section(title: str, results: Results, head: list[str], picks: list[Pick], form: str) -> list[str]:
    return [f"### {title}", "", *(by_variant(results, head, picks, form) if picks else [f"{MISSING}.", ""])]


def ablations(results: Results) -> list[str]:
    """At the short budget, beside the variant that each is an ablation of, at the same learning rate."""
    plan, lines = results.plan, [f"### Ablations, at {million(results.plan.short)} tokens", ""]
    bases = [name for name in MAIN if any(x.startswith(f"{name},") for x in ABLATIONS)]
    names = [x for base in bases for x in (base, *(y for y in ABLATIONS if y.startswith(f"{base},")))]
    asked = [run for name in names for run in results.best(name, plan.short)]
    far = [x for x in keys_of(asked, "context", "multiple") if any(perplexity_at(x)(run) is not None for run in asked)]
    pairs = keys_of(asked, "recall", "pairs")
    rows = []
    for name in names:
        runs = results.best(name, plan.short)
        rates = {run.about["lr"] for run in runs}
        same = [run for run in results.at(name.partition(",")[0], plan.size, plan.short) if run.about["lr"] in rates]
        own, of_base = mean(runs, loss_of), mean((run for run in same if run.state == "complete"), loss_of)
        apart = MISSING if own is None or of_base is None else f"{own.value - of_base.value:+.4f}"
        recall = [shown(mean(runs, row_of("recall", "accuracy", pairs=x, form=FORMS[0])), ".1%") for x in pairs]
        perplexity = MISSING
        if far:
            perplexity = shown(mean(runs, perplexity_at(far[-1])), ".2f")
        rows.append(
            [f"`{name}`", ", ".join(f"{x:g}" for x in sorted(rates)) or MISSING, shown(own), apart, perplexity]
            + [" / ".join(recall) if recall and runs else MISSING]
        )
    head = ["variant", "lr", "held-out loss", "difference", "perplexity at the longest context", "recall by pairs"]
    note = "*Difference* to the base at the same learning rate; ± of bases: half of the distance of two seeds."
    return [*lines, *table(head, rows), note, ""]


def rates(results: Results) -> list[str]:
    """Last validations of the sweep: by these, and not by what the other tables show, a rate is chosen."""
    plan = results.plan
    found = {name: results.sweep(name) for name in TWO_SEEDS}
    columns = sorted({rate for runs in found.values() for rate in runs})
    if not columns:
        return [f"### Learning rates, at {million(plan.short)} tokens", "", f"{MISSING}.", ""]

    def cell(name: str, rate: float) -> str:
        run = found[name].get(rate)
        loss = run.valid_loss if run else None
        return MISSING if run is None else run.state if run.state != "complete" or loss is None else f"{loss:.4f}"

    rows = [[f"`{name}`", *(cell(name, rate) for rate in columns)] for name in TWO_SEEDS]
    others = ", ".join(f"`{name}`" for name, family in FAMILY.items() if family != name)
    note = (
        f"The last validation in training, of the same held-out packages that the other tables are of; {others} take "
        "the rate of `7:1`."
    )
    return [
        f"### Learning rates, at {million(plan.short)} tokens", "",
        *table(["validation loss", *(f"{rate:g}" for rate in columns)], rows), note, "",
    ]  # fmt: skip


def fidelity(found: dict) -> list[str]:
    """Tables of fidelity.json."""
    lines = []
    if "curves" in found:
        about = found["curves"]
        reference, losses = about["reference"], about["held_out"]
        number = lambda value, form: MISSING if value is None else f"{value:{form}}"
        words = {True: "yes", False: "no", None: MISSING}
        rows = []
        for name, state in about["states"].items():
            row = about["distances"].get(name)
            cells = [f"`{name}`", str(about["steps"][name])]
            if row is None:  # the reference, or diverged
                own = number(losses.get(name), ".5f") if name == reference else state
                rows.append([*cells, "-", "-", own, "-", "-", "-"])
                continue
            cells += [f"{row['largest']:.5f}", f"{row['largest_of_seeds']:.5f}", number(row["held_out"], ".5f")]
            cells += [number(row["difference"], "+.5f"), number(row["distance_of_seeds"], ".5f")]
            rows.append([*cells, "-" if name == row["seeds"] else words[row["within"]]])
        head = ["path", "steps", "largest difference of block means", "of seeds", "held-out loss", "difference"]
        lines += [f"### Fidelity: {about['size']}, {about['card']}, difference to `{reference}`", ""]
        lines += table([*head, "of seeds", "both within the seeds'"], rows)
        lines += ["A path with a second seed is compared with the first seed of its arithmetic: the noise.", ""]
    for about in found.get("states", {}).values():
        title = f"Largest value in the states of `{about['run']}`; weakest decay {about['log_decay']:.2e} per token"
        lines += [f"### {title}", ""]
        marked = [row for i, row in enumerate(about["rows"], 1) if i & (i - 1) == 0 or i == len(about["rows"])]
        rows = [[f"{row['tokens']:,}", f"{row['all']:.4g}", f"{row['weakest']:.4g}"] for row in marked]
        lines += table(["tokens", "all heads", "head of weakest decay"], rows)
    return lines


def every_run(results: Results) -> list[str]:
    number = lambda value, form: "-" if value is None else format(value, form)
    rows = []
    for run in results.every:
        about = run.about
        rows.append(
            [
                f"`{run.variant}` {about['tag']}".rstrip(), about["size"], run.transformer_impl,
                million(about["tokens"]), str(about["seed"]), f"{about['lr']:g}",
                f"{about['parameters'] / 1e6:.2f}M" if "parameters" in about else "-",
                number(loss_of(run), ".4f"), number(run.valid_loss, ".4f"),
                f"{run.train_loss:.4f}" if run.losses else "-", f"{run.minutes:.1f}", number(run.speed, ",.0f"),
                run.state, ", ".join(sorted(run.cards)), ", ".join(sorted({x["commit"] for x in about["stretches"]})),
            ]
        )  # fmt: skip
    head = ["variant", "size", "layers", "tokens", "seed", "lr", "parameters", "held-out loss", "validation"]
    head += ["train loss", "GPU minutes", "tokens/s", "state", "card", "commit"]
    note = (
        "GPU minutes: training with starts, validations and saves, and evaluation; without a speed, others used the "
        "GPU at the same time. Train loss: the last twentieth."
    )
    data = {run.about["data"] for run in results.every}
    mixed = ["**These runs are not of the same text**: see `data` in their files.", ""] if len(data) > 1 else []
    return ["### Every run", "", note, "", *mixed, *table(head, rows)]


def missing(results: Results) -> list[str]:
    names = [f"`{name}` {size} {million(tokens)} seed {seed}" for name, size, tokens, seed in results.missing()]
    if not names:
        return ["Every run of the plan is there and complete.", ""]
    return [f"Missing, of {len(results.plan.wanted())} runs of the plan, {len(names)}: {', '.join(names)}.", ""]


SECTIONS: tuple[Callable[[Results], list[str]], ...] = (
    cost, packages, positions, contexts, recalls, needles, copies, ablations, rates,
)  # fmt: skip


def readme_table(results: Results) -> list[str]:
    """What decides on a ratio, of the variants that have all of their tokens: README's table."""
    length, sizes = SIZES[results.plan.size].seq_length, (results.plan.size, results.plan.long_size)
    columns: list[tuple[str, Pick, str]] = [
        ("held-out loss", loss_of, ".3f"),
        *((f"perplexity at {x * length:,}", perplexity_at(x), ".2f") for x in (1, 16, 64)),
        ("recall of 32 pairs", row_of("recall", "accuracy", form="lines", pairs=32), ".0%"),
        (f"needle in {length:,}", needle_of("exact", length), ".0%"),
    ]
    rows = []
    for name in MAIN:
        if runs := results.main(name):
            row = [f"`{name}`", *(shown(mean(runs, pick), form) for _, pick, form in columns)]
            speeds = (results.speed(name, size) for size in sizes)
            rows.append([*row, *(MISSING if speed is None else f"{speed:,.0f}" for speed in speeds)])
    heads = [*(head for head, *_ in columns), *(f"tokens/s at {SIZES[size].seq_length:,}" for size in sizes)]
    return table(["lightning : softmax", *heads], rows)


def put(page: Path, made: list[str]) -> str:
    """Put lines into ``page`` between its marks; returns what stands there.

    Raises:
        ValueError: the page has no marks.
    """
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{page} must hold {BEGIN} and {END} once each")
    inside = "\n".join(made).strip() or NOTHING
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{inside}\n\n{END}{rest.split(END)[1]}")
    return inside


def write(results: Path, page: Path, plan: Plan = PLAN, readme: Path | None = None) -> str:
    """Put tables and plots of all results into ``page``, and ``readme_table`` into ``readme``; returns what stands in
    the page between its marks.

    Raises:
        ValueError: a page has no marks.
    """
    from .plots import draw

    found, lines = Results(load(results), plan), []
    if found.every:
        lines += ["### In short", "", *verdicts(found), "", *missing(found)]
        for path, title in draw(found, results):
            lines += [f"![{title}]({path.resolve().relative_to(page.resolve().parent, walk_up=True)})", ""]
        lines += [line for section in SECTIONS for line in section(found)]
    if (results / FIDELITY).is_file():
        lines += fidelity(json.loads((results / FIDELITY).read_text("utf-8")))
    if found.every:
        lines += every_run(found)
    if readme is not None:
        put(readme, readme_table(found))
    return put(page, lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "write"))
    parser.add_argument("--runs", type=Path, help="folder of all runs, to collect from")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/quality.md", help="(%(default)s)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="(%(default)s)")
    options = parser.parse_args(argv)
    if options.what == "collect":
        if options.runs is None:
            parser.error("collect needs --runs, the folder of train")
        if not any(options.runs.glob("*/run.json")):
            parser.error(f"--runs {options.runs}: no run there (NAME/run.json); give the folder of train")
        try:
            print(f"{collect(options.runs, options.results)} runs are in {options.results}")
        except ValueError as error:
            raise SystemExit(f"report: {error}") from error
    else:
        if not options.results.is_dir():  # a page of no results would take the place of what is there
            parser.error(f"--results {options.results}: no such folder; give the one of collect or of session")
        for flag, path in (("page", options.page), ("readme", options.readme)):
            if not path.is_file():
                parser.error(f"--{flag} {path}: no such file; give one in which the results have a place")
        write(options.results, options.page, readme=options.readme)
        print(f"{options.page} and {options.readme} are written")


if __name__ == "__main__":
    main()
