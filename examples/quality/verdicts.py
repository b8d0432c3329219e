"""What is worse than softmax, said first; what noise hides; what is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .picks import Pick, gap, keys_of, loss_of, needle_of, perplexity_at, row_of
from .results import Results, mean, million
from .tasks import FORMS
from .variants import HYBRIDS, MAIN


@dataclass(frozen=True)
class Question:
    """One value by which variants are compared."""

    title: str
    pick: Pick
    form: str
    more: bool = False
    """Whether more is better."""
    cases: Pick | None = None
    """Of a share: how many answers it is of."""


FEWEST = 20  # answers, below which a share is not judged


def questions(results: Results) -> list[Question]:
    runs = [run for name in MAIN for run in results.main(name)]
    found = [Question("held-out loss", loss_of, ".4f")]
    for x in keys_of(runs, "context", "multiple"):
        found.append(Question(f"perplexity at {x:g}x", perplexity_at(x), ".2f"))
    for form in FORMS:
        for x in keys_of(runs, "recall", "pairs"):
            pick, cases = (row_of("recall", value, pairs=x, form=form) for value in ("accuracy", "queries"))
            found.append(Question(f"recall of {x:g} pairs ({form})", pick, ".1%", True, cases))
    for x in keys_of(runs, "needle", "length"):
        pick, cases = (needle_of(value, x) for value in ("exact", "cases"))
        found.append(Question(f"needle in {x:,.0f} tokens", pick, ".0%", True, cases))
    for x in keys_of(runs, "copy", "distance"):
        pick, cases = (row_of("copy", value, distance=x) for value in ("exact", "cases"))
        found.append(Question(f"copy over {x:,.0f} tokens", pick, ".0%", True, cases))
    return found


def noise(results: Results, name: str, question: Question) -> float | None:
    """A difference between a variant and softmax that means nothing: the largest distance between seeds of any variant,
    and two standard errors of what the answers or packages leave to chance. None where no variant has two seeds, or
    where the answers or packages are too few.
    """
    pick, both = question.pick, [results.main(x) for x in (name, "softmax")]
    seeds = [found.spread for x in MAIN if (found := mean(results.main(x), pick)) and found.count > 1]
    if not seeds:
        return None
    chance = 0.0
    if question.cases is not None:
        variance = 0.0
        for runs in both:
            share, count = mean(runs, pick), sum(question.cases(run) or 0 for run in runs)
            if share is None or count < FEWEST:
                return None
            smooth = (share.value * count + 1) / (count + 2)  # a share of 0 or 1 is not certain either
            variance += smooth * (1 - smooth) / count
        chance = 2 * math.sqrt(variance)
    elif pick is loss_of and (found := gap(*both)):
        if found.error is None:
            return None
        chance = 2 * found.error
    return max(*seeds, chance)


def verdicts(results: Results) -> list[str]:
    """Lightning and all hybrids beside softmax: what is worse, what nothing tells apart, what is better."""
    plan = results.plan
    if mean(results.main("softmax"), loss_of) is None:
        runs = results.main("softmax")
        what = "was not evaluated" if runs else "is missing"
        return [f"Nothing can be compared yet: `softmax` with {million(plan.tokens)} tokens {what}."]
    lines = []
    for name in ("lightning", *HYBRIDS):
        kinds: dict[str, list[str]] = {"worse": [], "within noise": [], "better": [], "not judged": []}
        for question in questions(results):
            own, other = (mean(results.main(x), question.pick) for x in (name, "softmax"))
            if own is not None and other is not None:
                better = (own.value - other.value) * (1 if question.more else -1)
                least = noise(results, name, question)
                kind = "not judged" if least is None else "within noise" if abs(better) <= least else ""
                kind = kind or ("better" if better > 0 else "worse")
                kinds[kind].append(f"{question.title} {own.value:{question.form}} ({other.value:{question.form}})")
        if any(kinds.values()):
            judged = any(x for kind, x in kinds.items() if kind != "not judged")
            lines += [
                f"- `{name}`, {kind}: {'; '.join(x) or 'nothing'}."
                for kind, x in kinds.items()
                if x or (judged and kind != "not judged")  # "worse: nothing" of what nobody judged would mislead
            ]
    if not lines:
        return [f"Nothing can be compared yet: of {million(plan.tokens)} tokens only `softmax` was evaluated."]
    head = (
        f"Beside `softmax`, whose values are in brackets, after {million(plan.tokens)} tokens. *Within noise*: a "
        "difference of at most the largest distance between two seeds of one variant, or two standard errors of the "
        "answers or packages. *Not judged*: no variant has two seeds there, or fewer than "
        f"{FEWEST} answers or two packages. Beyond the training length the better angles of two count (below). In all "
        "tables ± is half of the distance between seeds."
    )
    return [head, "", *lines]
