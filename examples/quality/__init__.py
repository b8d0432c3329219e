"""Is lightning attention as good as softmax? The steps from packages to a report; docs/quality.md says how to run them.

Each module is one step, run as ``python -m examples.quality.STEP`` from the checkout:

    packages    download what packages.txt and debian.txt pin, by version and sha256
    corpus      their text: filtered, without duplicates, split by package
    tokens      a tokenizer, Megatron's datasets, and shards small enough to be sent
    session     several variants on a lent machine: the two steps below, within a deadline
    train       one variant (variants.py), in stretches that go on where the last one stopped
    evaluate    losses, perplexity at long contexts, recall, needles, copies of one checkpoint
    fidelity    the same training by other arithmetic; sizes of states
    report      tables and plots (plots.py) of docs/quality.md, from the JSON of the steps above (results.py)
    smoke       all of it at toy size
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"

if str(ROOT / "examples") not in sys.path:  # scripts there import each other by name
    sys.path.append(str(ROOT / "examples"))
