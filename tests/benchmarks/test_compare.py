"""`python -m benchmarks compare`: turns of two revisions, ratios with intervals, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from benchmarks import compare, compare_worker, record
from benchmarks.__main__ import main
from benchmarks.workload import ConvWorkload
from tests.benchmarks.conftest import TINY

JOB = {"device": "cpu", "seconds": 0.0, "threads": None, "check": True}
OPTIONS = ["--device", "cpu", "--cases", "tiny"]
# Stands in for the worker: its times are what its fastseg says, and it keeps a diary.
WORKER = """
import json, pathlib, sys, time
import fastseg
job = json.load(sys.stdin)
with open(DIARY, "a") as diary:
    diary.write(fastseg.NAME + str(int(job["check"])) + " ")
time.sleep(fastseg.SLEEPS)
found = {"/".join(step[1:]): {"fastseg": fastseg.SECONDS, "native": 3.0} for step in job["steps"]}
print(json.dumps(found))
"""
SETUP = "import pathlib\npathlib.Path('fastseg/_build.json').write_text('made by the revision')\n"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two revisions, of which the second is twice as fast; "HEAD" is the first."""
    root = tmp_path / "repository"
    for folder in ("fastseg", "benchmarks", "csrc"):
        (root / folder).mkdir(parents=True)
    write(root, "old", seconds=2.0)
    (root / "benchmarks" / "__init__.py").write_text("")
    (root / "benchmarks" / "compare_worker.py").write_text(f"DIARY = {str(tmp_path / 'diary')!r}\n{WORKER}")
    (root / "csrc" / "kernel.cpp").write_text("// a kernel\n")
    (root / "setup.py").write_text(SETUP)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "old")
    (root / "fastseg" / "_build.json").write_text("made here")
    write(root, "new", seconds=1.0)
    home = tmp_path / "temporary"
    home.mkdir()
    monkeypatch.setattr(compare.tempfile, "tempdir", str(home))
    monkeypatch.setattr(record, "ROOT", root)
    monkeypatch.setattr("benchmarks.cases.CASES", (TINY,))
    yield root
    assert list(home.iterdir()) == []
    assert len(git(root, "worktree", "list").splitlines()) == 1


def write(root: Path, name: str, seconds: float, sleeps: float = 0.0) -> None:
    (root / "fastseg" / "__init__.py").write_text(f"NAME, SECONDS, SLEEPS = {name!r}, {seconds}, {sleeps}\n")


def built_by(monkeypatch, builder) -> None:
    monkeypatch.setattr(compare, "build", builder)


def test_revisions_take_turns_and_ratios_have_intervals(repository, tmp_path, monkeypatch, capsys):
    built = []
    built_by(monkeypatch, lambda tree, device: built.append(tree))
    assert main(["compare", "HEAD", *OPTIONS, "--rounds", "6"]) == 0
    assert [tree.name for tree in built] == ["tree"]
    turns = (tmp_path / "diary").read_text().split()
    assert turns == ["old1", "new1", "new0", "old0"] + ["old0", "new0", "new0", "old0"] * 2
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("tiny/forward/float32"))
    assert row.split()[1:] == ["2", "s", "1", "s", "2.000x", "2.000", "to", "2.000", "faster"]
    assert "interval: where the median of the pairs lies, 97 % sure" in lines


def test_a_slower_tree_is_said_to_be(repository, monkeypatch, capsys):
    built_by(monkeypatch, lambda tree, device: None)
    write(repository, "new", seconds=4.0)
    assert main(["compare", "HEAD", *OPTIONS, "--rounds", "5"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny/forward"))
    assert row.endswith("0.500x   0.500 to 0.500 SLOWER")


def test_few_rounds_give_no_verdict(repository, monkeypatch, capsys):
    built_by(monkeypatch, lambda tree, device: None)
    assert main(["compare", "HEAD", *OPTIONS, "--rounds", "3"]) == 0
    said = capsys.readouterr().out
    assert "2.000x   2.000 to 2.000\n" in said
    assert "75 % sure, too little for a verdict: more --rounds" in said


def test_a_result_that_is_refused_has_no_ratio():
    (step,) = compare.plan(compare.Settings(cases="mobilenet-384", dtypes=("float32",), networks=False))[:1]
    wrong = {"old": [{"fastseg": 1.0, "native": 1.0}], "new": [{"refused": "wrong result, it is off"}]}
    (_, row, _) = compare.lines({step.id: wrong}, [step], "HEAD")
    assert row.split(None, 1)[1] == "no speed, new: wrong result, it is off"


def test_native_that_differs_between_the_sides_is_said():
    (step,) = compare.plan(compare.Settings(cases="mobilenet-384", dtypes=("float32",), networks=False))[:1]
    pairs = {"old": [{"fastseg": 1.2, "native": 1.2}] * 6, "new": [{"fastseg": 1.0, "native": 1.0}] * 6}
    _, row, _, last = compare.lines({step.id: pairs}, [step], "HEAD")
    assert row.endswith("1.200x   1.200 to 1.200 as native")
    assert last == f"native, which is the same on both sides, differs in 1 rows: {step.id} 1.200x"


@pytest.mark.parametrize(("revision", "status"), [("HEAD", 0), ("no-such-revision", 2)])
def test_what_git_does_not_know_is_refused(repository, revision, status, monkeypatch, capsys):
    built_by(monkeypatch, lambda tree, device: None)
    assert main(["compare", revision, *OPTIONS, "--rounds", "1"]) == status
    assert ("git knows no revision 'no-such-revision'" in capsys.readouterr().err) is (status == 2)


def test_nothing_is_compared_where_no_row_fits(repository, capsys):
    assert main(["compare", "HEAD", "--device", "cpu", "--cases", "none"]) == 2
    assert "no row fits this selection" in capsys.readouterr().err


# The build


def test_the_same_kernels_are_not_built_again(repository, monkeypatch):
    with compare.trees("HEAD", lambda tree: compare.build(tree, "cpu")) as folders:
        assert (folders["old"] / "fastseg" / "_build.json").read_text() == "made here"


def test_other_kernels_are_built_in_the_worktree(repository, capsys):
    (repository / "csrc" / "kernel.cpp").write_text("// another kernel\n")
    with compare.trees("HEAD", lambda tree: compare.build(tree, "cpu")) as folders:
        assert (folders["old"] / "fastseg" / "_build.json").read_text() == "made by the revision"
        assert (folders["new"] / "fastseg" / "_build.json").read_text() == "made here"
        assert os.path.samefile(folders["old"] / "benchmarks", folders["new"] / "benchmarks")


def test_a_build_that_fails_is_said_and_cleaned_up(repository, capsys):
    (repository / "csrc" / "kernel.cpp").write_text("// another kernel\n")
    (repository / "setup.py").write_text("raise SystemExit('no compiler')\n")
    git(repository, "commit", "--quiet", "-m", "broken", "setup.py")
    assert main(["compare", "HEAD", *OPTIONS]) == 1
    error = capsys.readouterr().err
    assert "the revision does not build:" in error
    assert "no compiler" in error


def test_a_revision_that_cannot_be_measured_is_said_and_cleaned_up(repository, monkeypatch, capsys):
    built_by(
        monkeypatch, lambda tree, device: (tree / "fastseg" / "__init__.py").write_text("raise ValueError('too old')")
    )
    assert main(["compare", "HEAD", *OPTIONS]) == 1
    assert "the old revision cannot be measured by this benchmark: ValueError: too old" in capsys.readouterr().err


# Interruptions; that nothing is left is checked behind every test


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_an_interruption_while_measuring_leaves_nothing(repository, sent, monkeypatch, capsys):
    built_by(monkeypatch, lambda tree, device: None)
    write(repository, "new", seconds=1.0, sleeps=60.0)
    diary = repository.parent / "diary"

    def interrupt():
        while not diary.exists() or "new" not in diary.read_text():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), sent)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["compare", "HEAD", *OPTIONS]) == 130
    assert "interrupted: the worktree is removed" in capsys.readouterr().out


def test_an_interruption_while_building_ends_the_compilers(repository, capsys):
    """Which processes of the build start: here one that would write a file in the end."""
    proof = repository.parent / "compiled"
    compiler = f"import time, pathlib; time.sleep(1); pathlib.Path({str(proof)!r}).write_text('')"
    (repository / "csrc" / "kernel.cpp").write_text("// another kernel\n")
    setup = f"import subprocess, sys\nprint(subprocess.run([sys.executable, '-c', {compiler!r}]))\n"
    (repository / "setup.py").write_text(setup)
    git(repository, "commit", "--quiet", "-m", "slow", "setup.py")
    threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert main(["compare", "HEAD", *OPTIONS]) == 130
    threading.Event().wait(1.5)
    assert not proof.exists()


# The worker


@pytest.mark.parametrize(
    ("family", "case", "direction"),
    [
        ("operator", "mobilenet-384", "backward"),
        ("head", "bilinear-decoder", "forward"),
        ("block", "small-block", "training"),
        ("network", "small-unet", "inference"),
    ],
    ids=["operator", "head", "block", "network"],
)
def test_the_worker_times_every_kind_of_case(family, case, direction, monkeypatch, request):
    if case.startswith("small"):
        request.getfixturevalue("small")
    found = compare_worker.measure(family, case, direction, "float32", JOB)
    assert min(found["fastseg"], found["native"]) > 0


@pytest.mark.usefixtures("small")
def test_the_worker_refuses_wrong_results(monkeypatch):
    monkeypatch.setattr(ConvWorkload, "fastseg", lambda self, backend: lambda x, w: 2 * self._native(x, w))
    found = compare_worker.measure("operator", "tiny", "forward", "float32", JOB)
    assert found["refused"].startswith("wrong result, y: ")


@pytest.mark.usefixtures("small")
def test_the_worker_says_what_a_revision_lacks(monkeypatch):
    monkeypatch.delattr("fastseg.ops.conv2d")
    found = compare_worker.measure("operator", "tiny", "forward", "float32", JOB)
    assert found["refused"].startswith("AttributeError: ")


def test_the_worker_runs_as_a_process():
    job = {**JOB, "steps": [["operator", "mobilenet-384", "forward", "float32"]], "threads": 1}
    found = compare._worker(record.ROOT, job)
    assert {identity: set(result) for identity, result in found.items()} == {
        "mobilenet-384/forward/float32": {"fastseg", "native"}
    }
