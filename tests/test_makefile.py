"""The Makefile, run for real in a folder of its own, with an environment that only writes down what it is asked."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import environment

ROOT = Path(__file__).resolve().parents[1]
MARKER = ".lightning_demo"  # examples/demo.py

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# bin/python of the stub: every argument on a line, and for `-m venv --clear DIR` a copy of itself there
STUB = """#!/bin/sh
printf '%s\\n' "$@" END >> "{log}"
case "$*" in
    "-c "*) echo "usable $0" ;;
    "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
esac
"""


class Checkout:
    """A folder with the Makefile and what it reads. ``calls`` are the arguments of each call of the stub."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder.parent / "calls"
        for name in ("Makefile", "setup.py", "pyproject.toml", "tests/constraints.txt", "examples/find_python.sh"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)

    def stub(self, path: Path) -> Path:
        path.parent.mkdir(parents=True)
        path.write_text(STUB.format(log=self.log))
        path.chmod(0o755)
        return path

    def installed(self, venv: str = ".venv") -> Path:
        """A virtual environment that make takes for finished."""
        self.stub(self.folder / venv / "bin" / "python")
        (self.folder / venv / ".installed").touch()
        return self.folder / venv

    def make(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        variables = ("PYTHON", "VENV", "OUT", "JOBS", "PYTEST", "PAIRS", "SHARD", "MEGATRON")  # of the make around us
        inherited = {n: value for n, value in os.environ.items() if not n.startswith("MAKE") and n not in variables}
        self.log.unlink(missing_ok=True)
        return subprocess.run(
            ["make", *arguments],
            cwd=self.folder,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self) -> list[list[str]]:
        text = self.log.read_text() if self.log.exists() else ""
        return [call.splitlines() for call in text.split("END\n")[:-1]]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "a checkout")


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(parents=True)
    for name in names:
        (path / name).touch()
    return path


def test_clean_takes_a_name_with_a_space_for_one_name(checkout: Checkout) -> None:
    others = [folder_with(checkout.folder.parent / "some", "thesis"), folder_with(checkout.folder / "dir", "thesis")]
    demo = folder_with(checkout.folder.parent / "some dir", MARKER, "loss.png")
    run = checkout.make("clean", "OUT=../some dir")
    assert run.returncode == 0, run.stderr
    assert all((folder / "thesis").exists() for folder in others)
    assert not demo.exists()


@pytest.mark.parametrize("name", ["../foreign", "it's", "x$unset`y`", "-rf", "*", "."])
def test_clean_leaves_what_the_demo_did_not_make(checkout: Checkout, name: str) -> None:
    thesis = checkout.folder / name / "thesis"
    thesis.parent.mkdir(parents=True, exist_ok=True)
    thesis.touch()
    run = checkout.make("clean", "OUT=" + name.replace("$", "$$"))
    assert run.returncode == 0, run.stderr
    assert thesis.exists()
    assert f"left {name}: it holds no {MARKER}" in run.stdout


@pytest.mark.parametrize("name", ["it's", "x$unset`y`", "-rf", "*"])
def test_clean_removes_what_the_demo_made_whatever_its_name(checkout: Checkout, name: str) -> None:
    folder_with(checkout.folder / name, MARKER)
    run = checkout.make("clean", "OUT=" + name.replace("$", "$$"))
    assert run.returncode == 0 and not (checkout.folder / name).exists(), run.stderr
    assert (checkout.folder / "setup.py").exists()


def test_clean_of_the_root_folder_leaves_it(checkout: Checkout) -> None:
    rm = checkout.stub(checkout.folder.parent / "tools" / "rm")  # deletes nothing, should the Makefile be wrong
    run = checkout.make("clean", "OUT=/", "VENV=/", PATH=f"{rm.parent}:{os.environ['PATH']}")
    assert checkout.calls and not any("/" in call for call in checkout.calls)
    assert f"left /: it holds no {MARKER}" in run.stdout and "left /: it holds no .lightning_venv" in run.stdout


@pytest.mark.parametrize("name", ["..", ".", "../a checkout"])
def test_clean_leaves_a_marked_folder_around_the_checkout(checkout: Checkout, name: str) -> None:
    """Someone put the checkout into a folder that an earlier demo, or environment, had."""
    for mark in (MARKER, ".lightning_venv"):
        (checkout.folder / name / mark).touch()
    for path in (name, (checkout.folder / name).resolve()):
        run = checkout.make("clean", f"OUT={path}", f"VENV={path}")
        assert run.returncode == 0 and (checkout.folder / "setup.py").exists(), run.stderr
        assert run.stdout.count(f"left {path}: it holds this checkout") == 2


@pytest.mark.parametrize("slash", ["", "/"])
def test_clean_follows_a_link(checkout: Checkout, slash: str) -> None:
    demo, link = folder_with(checkout.folder.parent / "big disk" / "demo", MARKER, "loss.png"), checkout.folder / "link"
    link.symlink_to(demo)
    assert checkout.make("clean", f"OUT=link{slash}").returncode == 0
    assert not demo.exists() and link.is_symlink(), "the link is the user's"


def test_clean_leaves_folders_of_the_user(checkout: Checkout) -> None:
    theirs = ("dist", "build", "other.egg-info", "my project/__pycache__", ".their venv/lib/__pycache__")
    files = [folder_with(checkout.folder / name, "thesis") / "thesis" for name in theirs]
    ours = ("lightning_megatron/__pycache__", "tests/ops/__pycache__", "docs/_build", "lightning_megatron.egg-info")
    made = [folder_with(checkout.folder / name, "module.pyc") for name in ours]
    run = checkout.make("clean")
    assert run.returncode == 0, run.stderr
    assert all(file.exists() for file in files) and not any(folder.exists() for folder in made)


@pytest.mark.parametrize("name", ["../data", "..", ".", "my data"])
def test_venv_leaves_a_folder_that_make_did_not_create(checkout: Checkout, name: str) -> None:
    """`python -m venv --clear` would empty it."""
    python = checkout.stub(checkout.folder / "pythons" / "python3.12")
    (checkout.folder / name).mkdir(exist_ok=True)
    (checkout.folder / name / "thesis").touch()
    run = checkout.make("venv", f"VENV={name}", f"PYTHON={python}")
    assert run.returncode != 0 and f"VENV={name} holds files that make did not write" in run.stderr
    assert not any("venv" in call for call in checkout.calls)


def test_venv_that_failed_half_way_is_made_again(checkout: Checkout) -> None:
    python = checkout.stub(checkout.folder / "pythons" / "python3.12")
    works = python.read_text()
    python.write_text(works.replace('mkdir -p "$4/bin" &&', 'touch "$4/half"; exit 1 #'))
    assert checkout.make("venv", "VENV=an env", f"PYTHON={python}").returncode != 0
    assert (checkout.folder / "an env" / "half").exists()
    python.write_text(works)
    run = checkout.make("venv", "VENV=an env", f"PYTHON={python}")
    assert run.returncode == 0, run.stderr
    assert checkout.make("clean", "VENV=an env").returncode == 0 and not (checkout.folder / "an env").exists()


@pytest.mark.parametrize("target", ["demo", "clean"])
@pytest.mark.parametrize("variable", ["OUT", "VENV"])
def test_an_empty_name_is_refused(checkout: Checkout, target: str, variable: str) -> None:
    checkout.installed()
    run = checkout.make(target, f"{variable}=")
    assert run.returncode != 0 and f"{variable} is empty" in run.stderr
    assert checkout.calls == [] and (checkout.folder / ".venv").exists()


def test_clean_leaves_an_environment_that_make_did_not_create(checkout: Checkout) -> None:
    venv = checkout.installed("my env")
    run = checkout.make("clean", "VENV=my env")
    assert run.returncode == 0 and venv.exists()
    assert "left my env: it holds no .lightning_venv" in run.stdout
    (venv / ".lightning_venv").touch()
    assert checkout.make("clean", "VENV=my env").returncode == 0 and not venv.exists()


@pytest.mark.parametrize("name", ["demo_out", "a folder with space", "it's", "x$unset"])
def test_demo_takes_any_name(checkout: Checkout, name: str) -> None:
    checkout.installed()
    run = checkout.make("demo", "OUT=" + name.replace("$", "$$"))
    assert run.returncode == 0, run.stderr
    assert checkout.calls == [["examples/demo.py", f"--out={name}"]]


def test_venv_and_python_with_spaces(checkout: Checkout) -> None:
    python = checkout.stub(checkout.folder / "my pythons" / "python3.12")
    arguments = [f"PYTHON={python}", "VENV=an env", "OUT=the demo"]
    run = checkout.make("demo", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ["-m", "venv", "--clear", "an env"] in checkout.calls
    assert checkout.calls[-1] == ["examples/demo.py", "--out=the demo"]
    assert (checkout.folder / "an env" / ".installed").exists()
    assert checkout.make("demo", *arguments).returncode == 0
    assert checkout.calls == [["examples/demo.py", "--out=the demo"]], "installed a second time"
    assert checkout.make("clean", *arguments).returncode == 0 and not (checkout.folder / "an env").exists()


def test_pytest_arguments_are_words_as_in_a_shell(checkout: Checkout) -> None:
    checkout.installed()
    run = checkout.make("test", "PYTEST=-x -k 'one or two'")
    assert run.returncode == 0, run.stderr
    command = ["-m", "pytest", "tests", "-n", "2", "--dist", "worksteal"]
    assert checkout.calls[-1] == [*command, "--drawn=tests/drawn.txt", "-x", "-k", "one or two"]
    modules = [call[1] for call in checkout.calls if call[0] == "-m"]
    assert modules == ["ruff", "ruff", "mypy", "pytest"]
    assert checkout.make("test-all").returncode == 0 and checkout.calls[-1] == command


def test_check_runs_lint_types_and_quick_tests(checkout: Checkout) -> None:
    checkout.installed()
    run = checkout.make("check")
    assert run.returncode == 0, run.stderr
    modules = [call[1] for call in checkout.calls if call[0] == "-m"]
    assert modules == ["ruff", "ruff", "mypy", "pytest"]
    assert "@tests/quick.txt" in checkout.calls[-1]


@pytest.mark.parametrize("arguments", [(), ("MEGATRON=",), ("MEGATRON= ",)])
def test_main_needs_a_checkout(checkout: Checkout, arguments: tuple[str, ...]) -> None:
    run = checkout.make("test-main", *arguments)
    assert run.returncode != 0 and "make test-main MEGATRON=/path/to/Megatron-LM" in run.stderr
    assert checkout.calls == []


def test_main_names_the_checkout(checkout: Checkout) -> None:
    checkout.installed()
    run = checkout.make("test-main", "MEGATRON=/their files/Megatron-LM", "PYTEST=-x", "JOBS=3")
    assert run.returncode == 0 and "==> tests took " in run.stdout, run.stderr
    arguments = ["/their files/Megatron-LM", "tests", "-n", "3", "--dist", "worksteal", "-x"]
    assert checkout.calls == [["-m", "tests.checkout", *arguments]]


def test_a_folder_without_megatron_is_no_checkout(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.checkout", str(tmp_path), "--collect-only"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and f"MEGATRON={tmp_path} holds no megatron/core: name a checkout" in run.stderr


def test_quick_tests_exist(request: pytest.FixtureRequest) -> None:
    """Those that this session has not collected itself are collected by another."""
    collected = [f"{item.nodeid}[" for item in request.session.items]
    names = (ROOT / "tests/quick.txt").read_text().split()
    missing = [name for name in names if not any(x.startswith((f"{name}::", f"{name}[")) for x in collected)]
    if missing:
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *missing]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr


def test_docs_are_built_strictly(checkout: Checkout) -> None:
    checkout.installed()
    assert checkout.make("docs").returncode == 0
    assert checkout.calls[-1][:2] == ["-m", "sphinx"] and "--fail-on-warning" in checkout.calls[-1]


def test_help_names_every_command() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    commands = ("demo", "test", "test-all", "test-main", "quality-smoke", "check")
    commands += ("docs", "venv", "lint", "format", "types", "clean")
    assert all(f"make {command} " in text for command in commands)


def test_demo_refuses_a_marked_folder_around_the_checkout(checkout: Checkout) -> None:
    """It empties a folder that has the mark before it begins."""
    shutil.copytree(ROOT / "examples", checkout.folder / "examples", dirs_exist_ok=True)
    parent = checkout.folder.parent
    (parent / MARKER).touch()
    run = subprocess.run(
        [sys.executable, checkout.folder / "examples" / "demo.py", f"--out={parent}"], capture_output=True, text=True
    )
    assert run.returncode != 0 and f"{parent} holds this checkout" in run.stderr
    assert (checkout.folder / "setup.py").exists()


def test_a_checkout_of_megatron_hides_none_of_our_packages(tmp_path: Path) -> None:
    """Megatron-LM has packages examples and tests: a folder of ours without __init__.py would not be found."""
    for name in ("examples", "tests"):
        folder_with(tmp_path / name, "__init__.py")
    code = "import examples.megatron_log, examples.quality, tests.helpers; print(*map(str, examples.__path__))"
    run = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.split() == [str(ROOT / "examples")], run.stderr
