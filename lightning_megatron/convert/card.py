"""The verification card, for people and for programs: what was compared, how, with which versions, and the result."""

from __future__ import annotations

import hashlib
import math
import platform
import struct
from pathlib import Path
from typing import Any

from .. import __version__
from ..compat import version

Report = dict[str, Any]


def revision_of(folder: Path) -> dict[str, str]:
    """The commit that ``hf download`` noted in a folder; else a digest of config.json, headers and index.

    Weights themselves are not in the digest: every one of them is compared anyway.
    """
    notes = sorted((folder / ".cache/huggingface").rglob("*.metadata"))
    commits = sorted({lines[0].strip() for path in notes if (lines := path.read_text("utf-8").splitlines())})
    if commits:
        return {"kind": "commit of the download", "value": ", ".join(commits)}
    digest = hashlib.sha256()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors.index.json"))]
    for path in [*files, *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0] if path.suffix == ".safetensors" else -1
            digest.update(file.read(size))
    return {"kind": "sha256 of config.json, index and headers of *.safetensors", "value": digest.hexdigest()}


def versions() -> dict[str, str]:
    """Of everything that takes part."""
    found = {"lightning-megatron": __version__, "Python": platform.python_version()}
    for name in ("torch", "megatron-core", "transformers", "tokenizers", "safetensors"):
        found[name] = version(name)
    return found | {"CPU": _cpu()}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def plain(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: these become text."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---- in words --------------------------------------------------------------------------------------------------------


def tensor_words(found: dict[str, Any]) -> str:
    """One line on the tensors."""
    text = f"{found['same']} of {found['compared']} tensors have the same values"
    for status, words in (("close", "within the tolerance"), ("different", "different")):
        text += f", {found[status]} {words}" if found[status] else ""
    if found["absent"]:
        text += f"; {found['absent']} optional ones are not in the folder"
    return text + (f"; dtypes: {', '.join(found['other_dtypes'])}" if found["other_dtypes"] else "")


def greedy_words(greedy: dict[str, Any]) -> str:
    """One line on the tokens that both wrote."""
    if greedy["agree"]:
        return f"all {greedy['tokens']} are the same"
    text = f"the first {greedy['first_difference']} of {greedy['tokens']} are the same"
    if greedy["tie"]:
        return text + f"; there the two best logits of the reference are {greedy['margin']:.1e} apart, a tie"
    return text + f"; there the best logit of the reference leads by {greedy['margin']:.1e}"


def verdict(report: Report) -> str:
    """What is wrong, the first thing first; or what was found to be right."""
    wrong, tolerance = [], report["tolerance"]
    found = report["tensors"]
    if report["other_function"]:
        wrong.append("config.json describes another function than the checkpoint has")
    if found["not_finite"]:
        holes = found["not_finite"]
        have = "1 tensor has" if len(holes) == 1 else f"{len(holes)} tensors have"
        wrong.append(f"{have} NaN or infinity, the first {holes[0]}")
    if found["different"]:
        count = "1 tensor differs" if found["different"] == 1 else f"{found['different']} tensors differ"
        wrong.append(f"{count}, most of all {found['worst'][0]['name']}")
    layers = [row for row in report.get("layers", []) if not row["difference"] <= tolerance]
    if layers:
        row = layers[0]
        wrong.append(f"from layer {row['layer']} ({row['kind']}) on outputs differ, by {row['difference']:.1e} there")
    within = report.get("within", {})
    if not within.get("logits", True):
        wrong.append(f"logits differ by {report['logits']['difference']:.1e}")
    if not within.get("greedy", True):
        wrong.append("greedy tokens differ")
    if not within.get("tokens", True):
        wrong.append(
            f"only the first {report['tokens']['judged']} tokens can be judged, as experts of the next were chosen by "
            "less than the tolerance: try another --prompt"
        )
    if wrong:
        return "; ".join(wrong)
    if "layers" not in report:
        return f"{found['compared']} tensors; no model was run"
    most = max(row["difference"] for row in report["layers"])
    return (
        f"{found['compared']} tensors, {len(report['layers'])} layers (largest difference {most:.1e}), logits, tokens"
    )


def markdown(report: Report) -> str:
    """The card."""
    found, revision = report["tensors"], report["revision"]
    rows = [
        ("status", f"**{report['status']}**: {verdict(report)}"),
        ("date", report["date"]),
        ("revision", f"`{revision['value']}` ({revision['kind']})"),
        ("checkpoint", f"`{report['checkpoint']}`{_hybrid_words(report['hybrid_layer_pattern'])}"),
        ("command", f"`{report['command']}`" if report["command"] else "called from Python"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
        ("tolerance", f"{report['tolerance']:g} of the largest value"),
        ("tensors", tensor_words(found)),
        ("largest difference of a tensor", f"{found['largest_difference']:.3g}"),
        ("reference", report["reference"]),
    ]
    if "layers" in report:
        tokens, logits, greedy = report["tokens"], report["logits"], report["greedy"]
        rows += [
            ("tokens", f"{tokens['read']} read, then {tokens['written']} written; {tokens['prompt']}"),
            ("tokens compared", _judged_words(tokens)),
            ("logits", f"largest difference {logits['difference']:.1e} of the largest value, {logits['largest']:.3g}"),
            ("greedy tokens", greedy_words(greedy)),
        ]
        if report["expert_margin"] is not None:
            rows.append(("closest choice of an expert", f"a score {report['expert_margin']:.1e} above the next"))
    lines = [f"# {report['model']}", "", *([report["note"], ""] if report["note"] else []), "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in rows]
    for line in report["other_function"]:
        lines += ["", f"Another function: {line}"]
    if found["worst"]:
        lines += ["", "Tensors that differ most:", "", "| tensor | shape | largest difference | of the largest value |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| `{row['name']}` | {row['shape']} | {row['difference']:.3g} | {row['relative']:.1e} |"
            for row in found["worst"]
        ]
    if "layers" in report:
        lines += ["", "Largest difference of the output of each layer, by its largest value:", ""]
        lines += ["| layer | kind | difference |", "|---|---|---|"]
        lines += [f"| {row['layer']} | {row['kind']} | {row['difference']:.1e} |" for row in report["layers"]]
        lines += ["", "Greedy text of Megatron:", "", *_quoted(report["greedy"]["megatron"])]
        lines += ["", "and of the reference:", "", *_quoted(report["greedy"]["reference"])]
    return "\n".join(lines)


def _hybrid_words(pattern: str | None) -> str:
    return f", of HybridModel (`--hybrid-layer-pattern {pattern}`)" if pattern else ""


def _judged_words(tokens: dict[str, Any]) -> str:
    if tokens["judged"] == tokens["read"] + tokens["written"]:
        return "all"
    return f"the first {tokens['judged']}: experts of the next were chosen by less than the tolerance"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> list[str]:
    """As a code block, which shows any text as it is, on lines of at most 100 characters."""
    fence = "```"
    while fence in text:
        fence += "`"
    pieces = [
        line[i : i + 100].rstrip() for line in text.splitlines() or [""] for i in range(0, max(len(line), 1), 100)
    ]
    return [f"{fence}text", *pieces, fence]
