"""Does a Megatron checkpoint hold the model of a Hugging Face folder, and does it compute the same?"""

from __future__ import annotations

import datetime
import gc
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.hybrid import pattern_of
from . import card as cards
from . import model
from .dist_read import TRACKER, Checkpoint, step_folder
from .errors import ConvertError, UsageError, cannot
from .folder import Folder, local_folder
from .independent import Independent, model_of
from .plan import Task, plan_export, plan_import
from .prompt import Prompt
from .table import compare_tensors, differences, summary
from .work import free_memory

TOLERANCE = 1e-5
TOKENS = 64
_ENOUGH = 16  # tokens before a choice of experts that rounding may turn over
_LISTED = 5  # tensors with NaN
_SPARE = 1 << 30  # bytes beside the weights


def verify(
    source: Path,
    checkpoint: Path,
    *,
    step: int | None = None,
    prompt: str | None = None,
    tokens: int = TOKENS,
    tolerance: float = TOLERANCE,
    tensors_only: bool = False,
    prediction: bool = True,
    table: Path | None = None,
    card: Path | None = None,
    name: str | None = None,
    revision: str | None = None,
    note: str | None = None,
    command: str | None = None,
    jobs: int = 2,
    say: Callable[[str], None] = print,
) -> bool:
    """Compare a folder with an import of it, or with the checkpoint that it was exported from.

    Every tensor is compared. Then Megatron, which loads the checkpoint as a training does, and an independent reference
    (``independent``) read the same tokens on the CPU: outputs of every layer, logits, and the likeliest tokens that
    follow are compared. The two models are in memory one after the other. Call it in a process of its own: it patches
    torch (``lightning_megatron.cpu``).

    Args:
        source: Hugging Face folder.
        checkpoint: folder of ``--save`` or of an import, or one iteration in it.
        step: iteration; the last one by default.
        prompt: text that both read; by default one of our own.
        tokens: how many both write.
        tolerance: largest difference, by the largest value of the reference.
        tensors_only: run no model.
        prediction: False leaves out layers of multi-token prediction of the folder.
        table: JSON file to write, with a row for every tensor.
        card: folder to write NAME.md and NAME.json into.
        name: of the model; by default that of the folder.
        revision: of the model; by default what the folder tells, see ``card.revision_of``.
        note: a sentence for the card.
        command: what the card says was run.
        jobs: threads.
        say: told what was found.

    Returns:
        Whether all is within the tolerance.

    Raises:
        ConvertError: they cannot be compared, and why.

    Example:
        >>> verify(Path("Ring-mini-linear-2.0"), Path("ring-mini"), card=Path("cards"))  # doctest: +SKIP
    """
    if tensors_only and prompt is not None:
        raise UsageError("--prompt: --tensors-only runs no model; leave one of them out")
    folder, place = Folder(source), local_folder(checkpoint)
    if name is not None and name != Path(name).name:
        raise UsageError(f"--name {name!r} must be the name of a file, without folders")
    for path in (table.parent if table else None, card):
        if path is not None and path.exists() and not path.is_dir():
            raise UsageError(f"{path} is no folder; name one to write into")
    if not tensors_only:
        _start()  # before Megatron is imported, which the next line does
    held = Checkpoint(step_folder(place, step))
    tasks, kinds, flags = _plan(folder, held, None if prediction else say)
    independent = None if tensors_only else model_of(folder)
    if independent:
        _step_of(held.folder)
        _check_memory(tasks, independent)
    rows = compare_tensors(folder, held, tasks, tolerance, jobs)
    report: dict[str, Any] = {
        "model": name or folder.path.name,
        "revision": {"kind": "given", "value": revision} if revision else cards.revision_of(folder.path),
        "status": "failed",
        "note": note,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "checkpoint": held.folder.name,
        "hybrid_layer_pattern": pattern_of(held.common()["args"]),  # None: of GPTModel
        "tolerance": tolerance,
        "versions": cards.versions(),
        "tensors": summary(rows),
        "other_function": flags,
        "reference": independent.name if independent else "no reference: only tensors were compared",
    }
    _say_tensors(report, say)
    if independent:
        report |= _run(
            folder, held, independent, kinds, Prompt(folder.path, prompt, _rows_of(folder), say), tokens, tolerance
        )
        _judge(report, say)
    passed = not (report["tensors"]["different"] or report["tensors"]["not_finite"] or flags) and all(
        report.get("within", {}).values()
    )
    report["status"] = "passed" if passed else "failed"
    if table:
        _write(table, json.dumps(cards.plain(rows), indent=1))
        say(f"table of all tensors: {table}")
    if card:
        for suffix, text in ((".json", json.dumps(cards.plain(report), indent=2)), (".md", cards.markdown(report))):
            _write(card / f"{report['model']}{suffix}", text)
        say(f"card: {card / report['model']}.md and .json")
    say(f"{report['status']}: {cards.verdict(report)}")
    return passed


def _start() -> None:
    from .. import cpu

    try:
        cpu.enable()
    except RuntimeError as error:
        raise ConvertError(f"verify runs models on the CPU, in a process of its own: {error}") from error


def _plan(
    folder: Folder, held: Checkpoint, left_out: Callable[[str], None] | None
) -> tuple[list[Task], list[str], list[str]]:
    """Tasks of an export; the kind of each layer; in what config.json and checkpoint describe another function.

    ``left_out`` is told about layers of multi-token prediction that are left out; None leaves out none.
    """
    args = held.common()["args"]
    try:
        if left_out:
            model.leave_out_prediction(folder, left_out)
        family = model.family_of(folder.config)
        flags = model.differences_of_function(args, folder.config)
    except ValueError as error:
        raise ConvertError(f"{folder.path / 'config.json'} and {held.folder}: {error}") from error
    try:
        units = model.units_of(family, args, folder.config)
        tasks = plan_export(units, held.tensors, f"{held.folder} against {folder.path / 'config.json'}")
        plan_import(units, folder.tensors, f"{folder.path} against the model of {held.folder}")
    except (ConvertError, ValueError) as error:
        if flags:
            raise ConvertError(
                "\n  ".join([f"{folder.path} is another model than {held.folder} holds:", *flags, _remedy(flags)])
            ) from error
        if isinstance(error, ConvertError):
            raise
        raise ConvertError(f"{folder.path / 'config.json'} and {held.folder}: {error}") from error
    return tasks, model.kinds_of_layers(args), flags


def _remedy(flags: list[str]) -> str:
    """What to do where a folder is of another model than a checkpoint; by the lines of ``differences_of_function``."""
    if all(line.startswith("--mtp-num-layers: ") for line in flags):
        return (
            "one of them has no layers of multi-token prediction: compare an import without them with --no-prediction, "
            "and one with them without that flag; or give the export of the checkpoint"
        )
    return "give the folder that the checkpoint was imported from, or an export of it"


def _rows_of(folder: Folder) -> int:
    return int(folder.config["vocab_size"])


def _check_memory(tasks: Sequence[Task], independent: Independent) -> None:
    pieces = [piece for task in tasks for piece in task.unit.megatron]
    # Megatron's loader reads the two halves of a gated MLP apart, and joins those of all layers before it copies them.
    copied = [piece for piece in pieces if ".linear_fc1.weight" in piece.key]
    ours = 4 * sum(torch.Size(piece.shape).numel() for piece in [*pieces, *copied])
    theirs, free = independent.memory(), free_memory()
    if max(ours, theirs) + _SPARE > free:
        raise ConvertError(
            f"loading the model takes Megatron {ours / 1e9:.1f} GB in fp32, then the reference {theirs / 1e9:.1f} GB, "
            f"and {_SPARE / 1e9:.1f} GB beside; but {free / 1e9:.1f} GB of memory are free. Use a larger machine, or "
            "compare only tensors, with --tensors-only"
        )


# ---- running both ----------------------------------------------------------------------------------------------------


def _run(
    folder: Folder,
    held: Checkpoint,
    independent: Independent,
    kinds: list[str],
    prompt: Prompt,
    tokens: int,
    tolerance: float,
) -> dict[str, Any]:
    vocabulary = _rows_of(folder)
    ids = prompt.tokens
    limit = folder.config.get("max_position_embeddings")
    if limit and len(ids) + tokens > limit:
        raise UsageError(
            f"{len(ids)} tokens of prompt and --tokens {tokens} are more than max_position_embeddings {limit} of "
            "config.json; ask for fewer"
        )
    written, states, logits = _megatron(held, ids, tokens, vocabulary)
    every = [*ids, *written]
    wanted, wanted_logits = independent.outputs(every)
    judged = _judged(zip([*states, logits], [*wanted, wanted_logits], strict=True), independent.margins, tolerance)
    layers = [
        {"layer": number, "kind": kind, "difference": _apart(ours[:judged], theirs[:judged])[1]}
        for number, (kind, ours, theirs) in enumerate(zip(kinds, states, wanted, strict=True))
    ]
    difference, relative = _apart(logits[:judged], wanted_logits[:judged])
    return {
        "tokens": {"prompt": prompt.source, "read": len(ids), "written": tokens, "judged": judged},
        "layers": layers,
        "logits": {"difference": relative, "absolute": difference, "largest": float(wanted_logits.abs().max())},
        "expert_margin": None if independent.margins is None else float(independent.margins.min()),
        "greedy": _greedy(independent, prompt, written, wanted_logits),
    }


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """See ``table.differences``. Outputs that are not finite agree with nothing, not even with each other."""
    return differences(ours, theirs) if bool(theirs.isfinite().all()) else (math.nan, math.nan)


def _judged(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], margins: torch.Tensor | None, tolerance: float) -> int:
    """How many tokens are judged: all of them, if none differs.

    Rounding may turn over a close choice of experts. The token is then computed by another expert, and so are, through
    attention, those that follow: judged are the tokens before the first such choice, if it explains what differs.
    """
    wrong = torch.stack([
        ~((ours.double() - theirs.double()).abs().amax(-1) <= tolerance * theirs.double().abs().max())
        for ours, theirs in pairs
    ]).any(0)  # fmt: skip
    if margins is None or not wrong.any():
        return len(wrong)
    close = (margins[: int(wrong.nonzero()[0]) + 1] < tolerance).nonzero()
    return int(close[0]) if len(close) else len(wrong)


def _megatron(
    held: Checkpoint, ids: list[int], tokens: int, vocabulary: int
) -> tuple[list[int], list[torch.Tensor], torch.Tensor]:
    from ..inference import loading

    try:
        saved = loading.read_checkpoint(held.folder.parent, _step_of(held.folder))
        backend = ["--lightning-backend", "torch"]
        with loading.loaded_model(saved, vocab_size=vocabulary, flags=backend, dtype=torch.float32) as megatron:
            written = loading.greedy(megatron, ids, tokens, vocabulary)
            states, logits = loading.outputs(megatron, [*ids, *written])
            del megatron
        states = model.outputs_of_layers(saved.args, states)
    except loading.LoadError as error:
        raise ConvertError(str(error)) from error
    gc.collect()  # modules refer to themselves; their memory is needed for the reference
    return written, states, logits[:, :vocabulary].clone()


def _step_of(folder: Path) -> int | None:
    """The iteration for which Megatron reads this folder; None if its tracker file leads there.

    Raises:
        ConvertError: Megatron would read another folder.
    """
    number = folder.name.removeprefix("iter_")
    if number.isdecimal() and int(number) and folder.name == f"iter_{int(number):07d}":
        return int(number)
    tracker = folder.parent / TRACKER
    text = tracker.read_text("utf-8").strip() if tracker.is_file() else ""
    if folder.name != ("release" if text == "release" else f"iter_{int(text):07d}" if text.isdecimal() else ""):
        raise ConvertError(
            f"{folder}: Megatron finds a checkpoint by the name iter_0000123 of its folder, or by {tracker}, which "
            f"{'says ' + repr(text[:40]) if text else 'is not there'}; give its folder such a name, or compare with "
            "--tensors-only"
        )
    return None


def _greedy(independent: Independent, prompt: Prompt, written: list[int], logits: torch.Tensor) -> dict[str, Any]:
    """What the reference writes: as long as both agree, its logits of all tokens say it."""
    first = len(prompt.tokens) - 1
    theirs = logits[first:-1].argmax(-1).tolist() if written else []
    at = next((i for i, (a, b) in enumerate(zip(written, theirs, strict=True)) if a != b), None)
    margin = None
    if at is not None:
        best = logits[first + at].topk(2).values
        margin = float(best[0] - best[1])
        theirs = theirs[: at + 1]
        while len(theirs) < len(written):
            theirs.append(int(independent.outputs([*prompt.tokens, *theirs])[1][-1].argmax()))
    return {
        "tokens": len(written),
        "agree": at is None,
        "first_difference": at,
        "margin": margin,  # of the reference's best token, there
        "megatron": prompt.text(written),
        "reference": prompt.text(theirs),
    }


def _judge(report: dict[str, Any], say: Callable[[str], None]) -> None:
    tolerance, greedy = report["tolerance"], report["greedy"]
    read, written = report["tokens"]["read"], report["tokens"]["written"]
    say(f"reference: {report['reference']}; {read + written} tokens, of which {read} are the prompt's")
    say("largest difference, by the largest value of the reference:")
    for row in report["layers"]:
        mark = "" if row["difference"] <= tolerance else "   more than --tolerance"
        say(f"  layer {row['layer']:>3}  {row['kind']:<9}  {row['difference']:.1e}{mark}")
    say(f"  logits                {report['logits']['difference']:.1e}")
    judged = report["tokens"]["judged"]
    if judged < read + written:
        say(
            f"judged are the first {judged} tokens: the next one's experts were chosen by less than the tolerance, "
            "which rounding turns over, and outputs differ behind it"
        )
    tie = greedy["margin"] is not None and greedy["margin"] <= 2 * tolerance * report["logits"]["largest"]
    greedy["tie"] = tie
    report["within"] = {
        "layers": all(row["difference"] <= tolerance for row in report["layers"]),
        "logits": report["logits"]["difference"] <= tolerance,
        "greedy": greedy["agree"] or tie or read - 1 + greedy["first_difference"] >= judged,
        "tokens": judged >= min(_ENOUGH, read + written),
    }
    say(f"greedy tokens: {cards.greedy_words(greedy)}")
    say(f"  Megatron:  {greedy['megatron']}\n  reference: {greedy['reference']}")


def _say_tensors(report: dict[str, Any], say: Callable[[str], None]) -> None:
    found = report["tensors"]
    say(cards.tensor_words(found))
    for name in found["not_finite"][:_LISTED]:
        say(f"  NaN or infinity in {name}")
    for row in found["worst"]:
        say(f"  {row['status']:<9}  {row['name']} {row['shape']}: {row['difference']:.3g}, {row['relative']:.1e} of it")
    for line in report["other_function"]:
        say(f"another function: {line}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".tmp")
        fresh.write_text(text + "\n", "utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise cannot("write", path, error) from error
