# ruff: noqa: F401, F811 -- imported fixtures, and arguments that have their names
"""Winners are told apart by problem, and survive processes, mistakes in files, and writers at the same time."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseg
from fastseg import dispatch, extension, winners
from fastseg.winners import Table, Winner
from tests.tuning import PLAIN, clock, filters, forget, fresh, image, ran

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(extension.EXTENSION is None, reason="there are no kernels without the extension")


OTHERS = {
    "operator": PLAIN._replace(operator="dilated_conv2d"),
    "dtype": PLAIN._replace(dtype=torch.bfloat16),
    "gradient": PLAIN._replace(gradient=True),
    "epilogue": PLAIN._replace(epilogue="norm+relu"),
    **{
        name: PLAIN._replace(geometry=PLAIN.geometry._replace(**{name: value}))
        for name, value in {
            "input": (1, 8, 10, 9), "weight": (8, 1, 5, 5), "stride": (2, 2), "padding": (1, 1, 2, 2),
            "dilation": (2, 1), "output": (9, 8), "channels_last": False,
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", OTHERS.values(), ids=OTHERS)
def test_a_problem_of_its_own(problem):
    assert winners.key(problem) != winners.key(PLAIN)


def test_a_gpu_that_rounds_products_has_problems_of_its_own():
    problem = PLAIN._replace(device_type="cuda")
    assert winners.key(problem, tf32=True) != winners.key(problem, tf32=False)
    assert winners.key(problem._replace(dtype=torch.bfloat16), tf32=True) == winners.key(
        problem._replace(dtype=torch.bfloat16), tf32=False
    )


def test_a_file_of_its_own_for_each_number_of_threads(monkeypatch):
    one = winners.device_name("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert winners.device_name("cpu") != one
    assert winners.file_name(winners.device_name("cpu")).endswith("-77-threads.json")


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ("cpu family\t: 6\nmodel\t\t: 85\nmodel name\t: Xeon(R) Gold 6230\nmodel\t\t: 1\n", "Xeon(R) Gold 6230"),
        ("cpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n", "AMD EPYC family 26 model 2"),
        ("model name\t: Virtual\n", "Virtual"),
    ],
)
def test_a_processor_without_a_number_is_told_by_its_family(facts, name, tmp_path):
    (tmp_path / "cpuinfo").write_text(facts)
    assert winners.cpu_model(tmp_path / "cpuinfo") == name


def test_under_autocast_the_dtype_is_autocasts(clock):
    with torch.autocast("cpu", torch.bfloat16):
        assert dtypes(fastseg.tune(filters(), image())) == {"bfloat16"}
    assert dtypes(fastseg.tune(filters(), image())) == {"float32"}


def dtypes(tuned) -> set[str]:
    return {problem.split()[1] for problem in tuned.winners}


# What is remembered


def test_winners_reach_the_next_process(clock, tmp_path):
    clock.let("native")
    fastseg.tune(filters(), image())
    program = """
import torch, fastseg
torch.set_num_threads({threads})
layer = fastseg.nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)
with torch.no_grad():
    layer(torch.randn(1, 8, 9, 9))
    layer(torch.randn(1, 8, 10, 9))
print(fastseg.counters().native)
"""
    result = subprocess.run(
        [sys.executable, "-c", program.format(threads=torch.get_num_threads())],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() == "{('depthwise_conv2d', 'measured here'): 1}", result.stderr


def test_each_writer_keeps_what_the_others_wrote(tmp_path):
    one, other = (Table("a device", tmp_path / "device.json", tmp_path / "none.json") for _ in range(2))
    one.add({"first": native(1.0)})
    other.add({"second": native(2.0), "first": native(3.0)})
    one.add({"third": native(4.0)})
    found = Table("a device", tmp_path / "device.json", tmp_path / "none.json")
    assert {key: found.winner(key).ms["native"] for key in found.own} == {"first": 3.0, "second": 2.0, "third": 4.0}
    assert one.own == found.own


def native(ms: float) -> Winner:
    return Winner("native", {"native": ms})


def _write(path: Path, who: int, count: int) -> None:
    table = Table("a device", path, path.with_name("none.json"))
    for index in range(count):
        table.add({f"{who} {index}": native(1.0)})


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="forks")
def test_processes_that_write_at_once_lose_nothing_and_readers_see_whole_files(tmp_path):
    path, fork = tmp_path / "device.json", multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write, args=(path, who, 20)) for who in range(3)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            winners._read(path)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert len(winners._read(path)["winners"]) == 60
    assert not list(tmp_path.glob("*.tmp"))


def made_for(**changes) -> str:
    device = winners.device_name("cpu")
    content = {"schema": winners.SCHEMA, "made_for": winners.made_for(device) | changes, "winners": {}}
    return json.dumps(content)


def with_entry(entry) -> str:
    return json.dumps(json.loads(made_for()) | {"winners": {"some problem": entry}})


USELESS = {
    "truncated": ('{"schema": 2, "made_for"', "cannot be read"),
    "not-text": (b"\xff\xfe\x00", "cannot be read"),
    "a-list": ("[]", "not a file of winners of schema"),
    "another-schema": ('{"schema": 1, "winners": {}}', "not a file of winners of schema"),
    "no-maker": (json.dumps({"schema": winners.SCHEMA, "winners": {}}), "not a file of winners"),
    "no-time": (lambda: with_entry({"backend": "cpu", "ms": {"native": 1.0}}), "no winner of 'some problem'"),
    "no-number": (lambda: with_entry({"backend": "native", "ms": {"native": "fast"}}), "no winner of 'some problem'"),
    "another-torch": (lambda: made_for(torch="1.0"), "made for another version of fastseg or torch"),
    "another-fastseg": (lambda: made_for(fastseg="0.0.1"), "made for another version of fastseg or torch"),
    "other-kernels": (lambda: made_for(kernels="?"), "made for another version of fastseg or torch"),
    "other-operators": (lambda: made_for(operators="?"), "made for another version of fastseg or torch"),
}


@pytest.mark.parametrize(("content", "reason"), USELESS.values(), ids=USELESS)
def test_a_useless_file_is_told_once_and_made_anew(content, reason, clock, forget):
    path = winners.cache_folder() / winners.file_name(winners.device_name("cpu"))
    path.parent.mkdir()
    content = content() if callable(content) else content
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=f"{reason}.*: tuning starts anew") as told:
        _tune_twice(forget)
    assert len(told) == 1


def _tune_twice(forget=lambda: None) -> None:
    fastseg.tune(filters(), image())
    forget()
    fastseg.tune(filters(), image(10))
    assert len(winners.table("cpu").own) == 2


def test_a_folder_that_cannot_be_written_is_told_once_and_winners_stay_in_the_process(
    clock, monkeypatch, tmp_path, ran
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTSEG_CACHE", str(tmp_path / "file" / "folder"))
    layer, x = filters(), image()
    clock.let("native")
    with pytest.warns(UserWarning, match="the winners of tuning are kept in this process only") as told:
        _tune_twice()
    assert len(told) == 1
    ran.clear()
    with torch.no_grad():
        layer(x)
    assert ran["depthwise_conv2d"] == 0


def test_nobodys_home(monkeypatch):
    for name in ("FASTSEG_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="kept in this process only"):
        winners.table("cpu").add({"some problem": native(1.0)})
    assert winners.table("cpu").winner("some problem") is not None


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"FASTSEG_CACHE": "/own"}, "/own"),
        ({"FASTSEG_CACHE": "", "XDG_CACHE_HOME": "/xdg"}, "/xdg/fastseg"),
        ({"FASTSEG_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/me"}, "/me/.cache/fastseg"),
    ],
    ids=["own", "xdg", "home"],
)
def test_where_winners_are_kept(environment, folder, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert winners.cache_folder() == Path(folder)


def test_a_known_problem_costs_no_file_and_no_text(clock, monkeypatch):
    fastseg.tune(filters(), image())
    problem = PLAIN._replace(geometry=PLAIN.geometry._replace(padding=(2,) * 4, dilation=(2, 2), channels_last=False))
    first = dispatch.choose(problem)
    assert first.reason == "measured here"

    def forbidden(*_, **__):
        pytest.fail("a second look")

    for owner, name in ((Path, "open"), (winners, "key"), (winners, "table"), (winners, "device_name")):
        monkeypatch.setattr(owner, name, forbidden)
    assert dispatch.choose(problem) is first


# Winners that come with fastseg


@pytest.fixture
def shipped(clock, tmp_path, forget):
    """A table like the one that tuning makes, as if it had come with fastseg."""
    clock.let("native")
    fastseg.tune(filters(), image())
    own = winners.table("cpu").path
    (tmp_path / "shipped").mkdir()
    own.rename(tmp_path / "shipped" / own.name)
    forget()


def test_auto_takes_a_shipped_winner_and_explain_shows_it(shipped, ran):
    layer, x = filters(), image()
    with torch.no_grad():
        layer(x)
    assert ran["depthwise_conv2d"] == 0
    assert fastseg.counters().native == {("depthwise_conv2d", "measured on such a device"): 1}
    (row,) = fastseg.explain(layer, x).rows
    assert (row.kernel, row.reason, row.margin) == ("native", "measured on such a device", 2.0)
    assert "0 winners in " in fastseg.info().tuning["cpu"]
    assert fastseg.info().tuning["cpu"].endswith(", 1 come with fastseg")


def test_the_users_own_winners_come_first(shipped, clock):
    clock.let("cpu")
    layer, x = filters(), image()
    fastseg.tune(layer, x)
    (row,) = fastseg.explain(layer, x).rows
    assert (row.kernel, row.reason) == ("cpu", "measured here")
