"""A few of every kind of fault, through the checks of ``scripts/chaos``; many of them: ``scripts/chaos --full``."""

from __future__ import annotations

import pathlib
import re
import signal
import subprocess
import sys

import pytest
from chaos import Goal
from chaos.command import KINDS, goals, options, rows, table, written
from chaos.marked import config_file
from chaos.pairs import Group, arguments

from dsjax.hosts import EXIT_HOST_LOST

# What the other tests do not try already: test_chaos_syscalls has crash points and disk errors, test_formats and
# test_data_damage their own.
FEW = {"controls": 2, "kills": 8, "mutants": 1, "corruptions": 24, "meshes": 1, "hosts": 1, "sigterms": 1}


# With which gloo, XLA:CPU's own transport, aborts the process that was left, now and then, before any code of ours
# could see the loss (docs/log.md). Twice more are allowed, no more than that.
GLOO = "Is there a distributed collective mismatch in your code?"


# Without the defence Orbax reads what is not there, and leaves a coroutine that nobody awaits; the collector says so.
@pytest.mark.filterwarnings("ignore:coroutine 'Store._get_array_metadatas' was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <coroutine:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", FEW)
def test_a_few_faults_do_no_harm_and_would_without_the_defence(kind: str, tmp_path: pathlib.Path) -> None:
    found = list(goals(kind, FEW[kind], tmp_path, 0))
    for again in ("again", "and again"):
        if any(GLOO in str(goal.failures) for goal in found):
            (tmp_path / again).mkdir()
            found = list(goals(kind, FEW[kind], tmp_path / again, 0))
    for goal in found:
        assert goal.failures == ()
        assert goal.n > 0
        if kind in ("corruptions", "hosts", "sigterms") and "alarm" not in goal.name:
            assert goal.mutant
            assert ", 0 " not in goal.mutant  # without the defence some fail


def test_every_kind_has_a_number_of_its_own() -> None:
    asked = options(["--kills", "3", "--crash-points", "0", "--only", "kills,hosts"])
    assert (asked.kills, asked.crash_points, asked.hosts, asked.kinds) == (3, 0, None, ["kills", "hosts"])


def test_an_unknown_kind_is_one_sentence() -> None:
    command = [sys.executable, "-m", "chaos.command", "--only", "earthquakes"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--only names earthquakes; there are controls, kills" in done.stderr


def test_a_failure_stands_in_the_table() -> None:
    lines = table({"kills": rows("kills", [Goal("a", 1000, ("it broke",), 61.4, "3 of 4 fail")])}).splitlines()
    assert lines[-1] == "| kills | a | 1,000 | 1 | 61 | 3 of 4 fail |"


def test_the_report_holds_the_full_table() -> None:
    assert written().keys() == KINDS.keys()
    for kind, lines in written().items():
        counts = [[cell.strip() for cell in line.strip("|").split("|")][2:4] for line in lines]
        assert all(cell.replace(",", "").isdecimal() for row in counts for cell in row), lines
        assert all(failures == "0" for _, failures in counts), lines
        assert int(counts[0][0].replace(",", "")) >= min(KINDS[kind][1], 100), lines[0]


KILLED_BEFORE_CONNECTING = """
import os, signal, sys
import dsjax.hosts as hosts
if sys.argv[sys.argv.index("--process-id") + 1] == "{victim}":
    hosts._connect = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
hosts.CONNECT_SECONDS = 5
"""


@pytest.mark.parametrize(("victim", "processes"), [(0, 2), (1, 2), (0, 3), (1, 3)])
def test_a_process_that_is_lost_while_connecting_is_named(victim: int, processes: int, tmp_path: pathlib.Path) -> None:
    words = arguments(config_file(tmp_path), tmp_path / "run")
    code = KILLED_BEFORE_CONNECTING.format(victim=victim)
    ends = Group(words, processes=processes, devices=1, code=code).end(60)
    assert ends.pop(victim)[0] == -signal.SIGKILL
    for code, said, _ in ends:
        assert code == EXIT_HOST_LOST
        assert re.search(rf"^dsjax: .*but process {victim} \([^)]*\) was lost before all", said, re.MULTILINE), said
