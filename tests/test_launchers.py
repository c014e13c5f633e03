"""The launchers in scripts/ against a cloud of shell scripts: what they ask for, what they start again, when they stop.

``gcloud`` runs what it is told to run over ssh, once for each of two workers and at the same time, and exits with the
first code that is not 0, as the real one does. The installation is faked, and so is ``dsjax``: its n-th start on a
worker runs line n of that worker's plan.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
LAUNCHERS = ("pod", "tpu_vm", "gke", "on_slice", "worker", "guard")
SLICE = ("big", "--zone=us-east5-a", "--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5")

GCLOUD = r"""#!/usr/bin/env bash
printf '%q ' gcloud "$@" >>"$FAKE/calls"; echo >>"$FAKE/calls"
words="$*"
for word in "$@"; do
  case "$word" in --command=*) command="${word#*=}" ;; --*) ;; *) plain+=("$word") ;; esac
done
case "$words" in
  *queued-resources\ describe*)
    state="$(head -n 1 "$FAKE/states" 2>/dev/null)"
    [ "$(wc -l <"$FAKE/states")" -lt 2 ] || sed -i 1d "$FAKE/states"
    echo "${state%% *}" && [ -n "$state" ] ;;
  *tpu-vm\ describe*) [ "$(cat "$FAKE/node" 2>/dev/null)" ] && cat "$FAKE/node" ;;
  *queued-resources\ create*)
    [ ! -e "$FAKE/refuse" ] || { echo "ERROR: quota" >&2; exit 1; }
    printf 'WAITING_FOR_RESOURCES\nACTIVE\n' >"$FAKE/states"; echo READY >"$FAKE/node" ;;
  *queued-resources\ delete*) : >"$FAKE/states"; : >"$FAKE/node" ;;
  *tpu-vm\ scp*)
    for worker in 0 1; do mkdir -p "$FAKE/w$worker" && cp "${plain[4]}" "$FAKE/w$worker/dsjax.tar.gz"; done ;;
  *tpu-vm\ ssh*--worker=all*)
    [ ! -e "$FAKE/unreachable" ] || exit 255
    for worker in 0 1; do
      (cd "$FAKE/w$worker" && HOME=$PWD WORKER=$worker exec bash -c "$command") &
      pids[$worker]=$!
    done
    for worker in 0 1; do wait "${pids[$worker]}" || code="${code:-$?}"; done
    exit "${code:-0}" ;;
esac
"""
PYTHON = r"""#!/usr/bin/env bash
case "$*" in
  *print\(*) echo 3.12 ;;
  *"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"-m pip install"*) cp "$(command -v dsjax)" "${0%/*}/dsjax" ;;
esac
"""
# Each start runs its line of the plan in a function, so that it may `return`.
DSJAX = r"""#!/usr/bin/env bash
echo "$PWD: $*" >>"$FAKE/starts.$WORKER"
number="$(wc -l <"$FAKE/starts.$WORKER")"
line="$(sed -n "${number}p" "$FAKE/plan.$WORKER" 2>/dev/null || true)"
checkpoint() { mkdir -p "$FAKE/run/checkpoints/$1"; }
eval "${line:-exit 0}"
"""
TOOLS = {
    "gcloud": GCLOUD,
    "python3": PYTHON,
    "dsjax": DSJAX,
    "hostname": '#!/usr/bin/env bash\necho "worker-$WORKER"\n',
    "xpk": '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$FAKE/xpk"\nexit "${XPK_CODE:-0}"\n',
}


class Cloud:
    """A folder with the fakes on its PATH, the plans of two workers, and a record of the calls."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.run = folder / "run"
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, text in TOOLS.items():
            (bin_folder / name).write_text(text)
            (bin_folder / name).chmod(0o755)
        self.env = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "WORKER": "0",
            "DSJAX_PAUSE": "0",
            "DSJAX_STOP_SECONDS": "10",
        }
        (folder / "states").write_text("")

    def ready(self) -> None:
        (self.folder / "states").write_text("ACTIVE\n")
        (self.folder / "node").write_text("READY\n")

    def plan(self, *lines: str, other: tuple[str, ...] | None = None) -> None:
        """What the starts do on worker 0, and on worker 1 (the same unless given)."""
        for worker, plan in enumerate((lines, lines if other is None else other)):
            (self.folder / f"plan.{worker}").write_text("".join(f"{line}\n" for line in plan))

    def starts(self, worker: int = 0) -> list[str]:
        path = self.folder / f"starts.{worker}"
        return path.read_text().splitlines() if path.exists() else []

    def calls(self, *words: str) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in lines if " ".join(words) in line]

    def do(self, script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPTS / script, *words], env=self.env | env, cwd=self.folder, capture_output=True, text=True, timeout=60
        )

    def pod(self, *more: str) -> subprocess.CompletedProcess[str]:
        return self.do("pod", *SLICE, *more, "--", "configs/tiny.py", "--run", str(self.run), "train.steps=40")


@pytest.fixture
def cloud(tmp_path: pathlib.Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path)
    yield cloud
    for script in tmp_path.glob("w*/dsjax/scripts/worker"):  # nothing of a failed test runs on
        subprocess.run([script, "--stop"], env=cloud.env | {"DSJAX_STOP_SECONDS": "1"}, check=False, timeout=30)


def wait_for(what, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_says_how_to_call_it(cloud: Cloud, name: str) -> None:
    said = cloud.do(name, "--help")
    assert said.returncode == 0
    assert f"Usage: scripts/{name} " in said.stdout
    assert not said.stderr
    subprocess.run(["bash", "-n", SCRIPTS / name], check=True)
    assert os.access(SCRIPTS / name, os.X_OK)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("pod", "CONFIG and --run"),
        ("pod big --zone=z --", "CONFIG and --run"),
        ("pod big --zone=z -- configs/tiny.py", "--run is ''"),
        ("pod big --zone=z -- configs/tiny.py --run runs/tiny", "--run is 'runs/tiny'"),
        ("pod big --zone=z -- configs/none.py --run /runs/a", "'configs/none.py'"),
        ("pod big --zone=z -- configs/tiny.py --run /runs/a", "--accelerator-type"),
        ("pod big --zone=z --accelerator-type=v5p-8 -- configs/tiny.py --run /runs/a", "--runtime-version"),
        ("tpu_vm big --zone=z --accelerator-type=v5p-8 -- configs/tiny.py --run=/runs/a", "--runtime-version"),
        ("pod --zone=z --accelerator-type=a --runtime-version=v -- configs/tiny.py --run /runs/a", "one NAME"),
        ("pod a b --zone=z --accelerator-type=a --runtime-version=v -- configs/tiny.py --run /runs/a", "one NAME"),
        ("pod a --accelerator-type=a --runtime-version=v -- configs/tiny.py --run /runs/a", "--zone"),
        ("on_slice a --zone=z --", "what to run"),
        ("worker 1 2 /runs/a", "START LAUNCH RUN"),
        ("guard 1 /runs/a", "LAUNCH RUN COMMAND"),
        ("gke", "CONFIG and --run"),
        ("gke --workload=w --cluster=c -- configs/tiny.py --run /runs/a", "--tpu-type"),
        ("gke --workload=w --tpu-type=v5p-8 -- configs/tiny.py --run /runs/a", "--cluster"),
        ("gke --workload=w --cluster=c --tpu-type=v5p-8 -- configs/tiny.py --run a", "--run is 'a'"),
        ("gke --workload=w --cluster=c --tpu-type=v5p-8 -- nothing --run /runs/a", "'nothing'"),
    ],
)
def test_what_is_missing_is_one_sentence(cloud: Cloud, words: str, named: str) -> None:
    script, *rest = words.split()
    said = cloud.do(script, *rest)
    assert said.returncode == 2
    lines = said.stderr.strip().splitlines()
    assert len(lines) == 1, said.stderr
    assert named in lines[0]
    assert not cloud.calls("queued-resources create")


@pytest.mark.parametrize(
    ("tool", "words"),
    [("gcloud", ("pod", *SLICE)), ("xpk", ("gke", "--workload=w", "--cluster=c", "--tpu-type=v5p-8"))],
)
def test_a_missing_tool_is_one_sentence(cloud: Cloud, tool: str, words: tuple[str, ...]) -> None:
    bare = cloud.folder / "bare"
    bare.mkdir()
    for name in ("bash", "sed", "dirname", "env", "mktemp", "rm", "date"):
        (bare / name).symlink_to(str(shutil.which(name)))
    said = cloud.do(*words, "--", "configs/tiny.py", "--run", "/runs/a", PATH=str(bare))
    assert said.returncode == 2
    assert f"{tool} is not installed" in said.stderr


def test_a_slice_is_asked_for_and_every_worker_trains(cloud: Cloud) -> None:
    cloud.plan("checkpoint 40; exit 0")
    said = cloud.pod("--spot", "--internal-ips", "--network=mine", "--setup=echo mounted >>setup")
    assert said.returncode == 0, said.stderr
    (create,) = cloud.calls("queued-resources create")
    asked = " ".join(SLICE[2:])
    assert create.strip() == (
        f"gcloud compute tpus queued-resources create big --node-id=big --quiet {asked} --spot --internal-ips "
        "--network=mine --zone=us-east5-a"
    )
    (ssh,) = cloud.calls("tpu-vm ssh big")
    assert {"--worker=all", "--internal-ip", "--zone=us-east5-a"} <= set(shlex.split(ssh))
    (scp,) = cloud.calls("tpu-vm scp")
    assert {"big:dsjax.tar.gz", "--worker=all", "--internal-ip"} <= set(shlex.split(scp))
    for worker in (0, 1):
        folder = cloud.folder / f"w{worker}"
        assert (folder / "setup").read_text() == "mounted\n"
        assert cloud.starts(worker) == [
            f"{folder}/dsjax: train configs/tiny.py --run {cloud.run} train.steps=40"
        ]  # in the copied repository
    assert not cloud.calls("queued-resources delete")


@pytest.mark.parametrize("code", [0, 1, 2])
def test_an_end_that_a_restart_does_not_change_is_the_end(cloud: Cloud, code: int) -> None:
    cloud.ready()
    cloud.plan(f"exit {code}")
    assert cloud.pod().returncode == code
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [1, 1]
    assert not cloud.calls("queued-resources create")


def test_what_interrupts_starts_all_workers_again(cloud: Cloud) -> None:
    codes = (75, 130, 134, 137, 139, 143)
    cloud.ready()
    cloud.plan(
        *(f"checkpoint {i + 1}; exit 75" for i, _ in enumerate(codes)),
        "exit 0",
        other=(*(f"exit {code}" if code < 137 else f"kill -{code - 128} $$" for code in codes), "exit 0"),
    )
    said = cloud.pod()
    assert said.returncode == 0, said.stderr
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [7, 7]


def test_five_starts_without_a_new_checkpoint_are_enough(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(*["exit 137"] * 9)
    said = cloud.pod()
    assert said.returncode == 1
    assert len(cloud.starts()) == 5
    assert "brought no new checkpoint" in said.stdout


def test_the_guard_counts_starts_at_one_checkpoint_only(cloud: Cloud) -> None:
    def start(launch: str = "a", **env: str) -> int:
        return cloud.do("guard", launch, str(cloud.run), "bash", "-c", "exit 7", **env).returncode

    assert [start() for _ in range(6)] == [7] * 5 + [1]
    (cloud.run / "checkpoints" / "damaged-9").mkdir(parents=True)
    assert start() == 1  # no new checkpoint
    assert start("b") == 7  # a new launch
    assert start(WORKER="1") == 7  # another host
    for step in ("9", "10", "100-1"):  # by number, not by letter
        (cloud.run / "checkpoints" / step).mkdir()
        assert [start() for _ in range(6)] == [7] * 5 + [1]
    assert [start("c") for _ in range(3)] == [7] * 3
    (cloud.run / "checkpoints" / "101").mkdir()
    assert start("c") == 7
    (cloud.run / "checkpoints" / "101").rename(cloud.run / "checkpoints" / "damaged-101")
    assert [start("c") for _ in range(4)] == [7] * 4  # five at 100-1 by now, but not in a row
    (cloud.folder / "file").touch()
    said = cloud.do("guard", "a", str(cloud.folder / "file" / "run"), "true")
    assert said.returncode == 2
    assert "can not be made" in said.stderr


@pytest.mark.parametrize(
    ("request_state", "node"),
    [
        ("SUSPENDED", ""),
        ("SUSPENDING SUSPENDED", ""),
        ("FAILED", ""),
        ("ACTIVE", "PREEMPTED"),
        ("ACTIVE", "TERMINATED"),
    ],
)
def test_a_lost_slice_is_deleted_and_asked_for_anew(cloud: Cloud, request_state: str, node: str) -> None:
    cloud.ready()
    lost = f"printf '%s\\n' {request_state} >$FAKE/states; printf '{node}' >$FAKE/node; checkpoint 3; kill -9 $$"
    cloud.plan(lost, "exit 0", other=("sleep 0.2; exit 75", "exit 0"))
    said = cloud.pod()
    assert said.returncode == 0, said.stderr
    order = [call.split()[4] for call in cloud.calls("queued-resources") if "describe" not in call]
    assert order == ["delete", "create"]
    assert "--force" in cloud.calls("queued-resources delete")[0]
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [2, 2]
    assert "WAITING_FOR_RESOURCES" in said.stderr


@pytest.mark.parametrize("state", ["PROVISIONING", "SUSPENDING", "DELETING"])
def test_a_slice_on_its_way_is_waited_for(cloud: Cloud, state: str) -> None:
    cloud.ready()
    (cloud.folder / "states").write_text(f"{state}\n{state}\nACTIVE\n")
    archive = cloud.folder / "a.tar.gz"
    subprocess.run(["tar", "-czf", archive, "-C", ROOT, "LICENSE"], check=True)
    assert cloud.do("on_slice", *SLICE, f"--copy={archive}", "--", "test", "-e", "LICENSE").returncode == 0
    assert not cloud.calls("queued-resources create") + cloud.calls("queued-resources delete")
    assert len(cloud.calls(" describe big")) == 6


def test_a_refused_slice_is_the_users_mistake(cloud: Cloud) -> None:
    (cloud.folder / "refuse").touch()
    said = cloud.pod()
    assert said.returncode == 2
    assert "quota" in said.stderr
    assert len(cloud.calls("queued-resources create")) == 1


def test_workers_that_can_not_be_reached_are_given_up(cloud: Cloud) -> None:
    cloud.ready()
    (cloud.folder / "unreachable").touch()
    said = cloud.pod()
    assert said.returncode == 1
    assert "gave up" in said.stderr
    assert len(cloud.calls("tpu-vm ssh")) == 20


@pytest.fixture
def worker(cloud: Cloud) -> Cloud:
    """A worker with the scripts unpacked on it."""
    shutil.copytree(SCRIPTS, cloud.folder / "w0" / "dsjax" / "scripts")
    shutil.copy(ROOT / "pyproject.toml", cloud.folder / "w0" / "dsjax")
    return cloud


def follow(cloud: Cloud, start: str, output: str = "output") -> subprocess.Popen[bytes]:
    words = [cloud.folder / "w0/dsjax/scripts/worker", start, "launch", str(cloud.run), "configs/tiny.py"]
    with (cloud.folder / output).open("w") as file:
        return subprocess.Popen(words, env=cloud.env, stdout=file)


SAVES = "trap 'checkpoint 5; echo saved; exit 130' TERM; echo ready >$FAKE/ready; while :; do sleep 0.1; done"


def test_a_broken_connection_ends_nothing(worker: Cloud) -> None:
    worker.plan("echo hello; until [ -e $FAKE/go ]; do sleep 0.05; done; exit 75")
    first = follow(worker, "s.1", "first")
    wait_for(lambda: (worker.folder / "first").read_text() == "hello\n")
    first.kill()
    first.wait()
    again = follow(worker, "s.1", "again")
    wait_for(lambda: (worker.folder / "again").read_text() == "hello\n")
    (worker.folder / "go").touch()
    assert again.wait(20) == 175
    assert follow(worker, "s.1").wait(20) == 175  # also after its end
    assert len(worker.starts()) == 1


def test_a_new_start_first_lets_the_old_one_save(worker: Cloud) -> None:
    worker.plan(SAVES, "[ -e $FAKE/run/checkpoints/5 ] || exit 9; exit 0")
    old = follow(worker, "s.1")
    wait_for((worker.folder / "ready").exists)
    old.kill()  # the launcher's machine has gone
    old.wait()
    assert follow(worker, "s.2").wait(20) == 0
    assert len(worker.starts()) == 2


def test_a_start_that_will_not_end_is_killed(worker: Cloud) -> None:
    worker.env["DSJAX_STOP_SECONDS"] = "1"
    worker.plan("trap '' TERM; echo ready >$FAKE/ready; while :; do sleep 0.1; done")
    old = follow(worker, "s.1")
    wait_for((worker.folder / "ready").exists)
    assert follow(worker, "s.2").wait(20) == 0
    assert old.wait(20) in (0, 237)


def test_a_host_that_came_up_anew_is_no_success(worker: Cloud) -> None:
    worker.plan("exit 0")
    assert follow(worker, "s.1").wait(20) == 0
    (worker.folder / "w0/dsjax/build/worker/code").unlink()
    assert follow(worker, "s.1").wait(20) == 237


def test_interrupting_the_launcher_saves_on_every_worker(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan(SAVES.replace("$FAKE/ready", "$FAKE/ready.$WORKER"))
    words = [*SLICE, "--", "configs/tiny.py", "--run", str(cloud.run)]
    with (cloud.folder / "output").open("w") as file:
        # a test in the background would have SIGINT ignored
        command = ["env", "--default-signal=INT", SCRIPTS / "pod", *words]
        pod = subprocess.Popen(command, env=cloud.env, stdout=file, stderr=file)
    wait_for(lambda: all((cloud.folder / f"ready.{worker}").exists() for worker in (0, 1)))
    pod.send_signal(signal.SIGINT)
    assert pod.wait(30) == 130
    assert (cloud.folder / "output").read_text().count("saved\n") == 2
    assert [len(cloud.starts(worker)) for worker in (0, 1)] == [1, 1]
    assert not cloud.calls("queued-resources delete")


def test_one_vm_is_a_slice_with_one_worker(cloud: Cloud) -> None:
    cloud.ready()
    cloud.plan("exit 2")
    said = cloud.do("tpu_vm", *SLICE, "--", "configs/tiny.py", f"--run={cloud.run}")
    assert said.returncode == 2
    assert cloud.starts() == [f"{cloud.folder}/w0/dsjax: train configs/tiny.py --run={cloud.run}"]


def workload(cloud: Cloud, *flags: str) -> list[str]:
    required = ("--workload=big", "--cluster=mine", "--tpu-type=v5p-256", *flags)
    said = cloud.do("gke", *required, "--", "configs/tiny.py", "--run", str(cloud.run), "data.sources.0.path=/my texts")
    assert said.returncode == 0, said.stderr
    return (cloud.folder / "xpk").read_text().splitlines()


def test_gke_asks_xpk_for_a_workload_that_restarts(cloud: Cloud) -> None:
    words = workload(cloud, "--storage=runs", "--max-restarts=9")
    assert words[:2] == ["workload", "create"]
    assert {"--workload=big", "--cluster=mine", "--tpu-type=v5p-256", "--storage=runs"} <= set(words)
    assert "--restart-on-exit-codes=75" in words
    assert words.index("--max-restarts=9") > words.index("--max-restarts=50")  # argparse takes the last
    assert "--base-docker-image=python:3.12" in words
    image = {
        word for word in workload(cloud, "--docker-image=gcr.io/p/mine:1") if "image" in word or "script-dir" in word
    }
    assert image == {"--docker-image=gcr.io/p/mine:1"}
    cloud.env["XPK_CODE"] = "3"
    with pytest.raises(AssertionError):
        workload(cloud)


@pytest.mark.parametrize(("plan", "code"), [("exit 75", 75), ("exit 2", 2), ("kill -9 $$", 137), (SAVES, 130)])
def test_the_command_of_a_pod_passes_signals_and_codes_on(worker: Cloud, plan: str, code: int) -> None:
    """As XPK wraps it: a background job of a shell that passes SIGTERM on to it."""
    worker.plan(plan)
    (command,) = [word.removeprefix("--command=") for word in workload(worker) if word.startswith("--command=")]
    wrapped = f"trap 'kill -TERM $!' TERM; ({command}) & PID=$!; while kill -0 $PID; do sleep 0.1; done; wait $PID"
    pod = subprocess.Popen(
        ["bash", "-c", wrapped], env=worker.env, cwd=worker.folder / "w0/dsjax", stderr=subprocess.DEVNULL
    )
    if plan == SAVES:
        wait_for((worker.folder / "ready").exists)
        pod.send_signal(signal.SIGTERM)
    assert pod.wait(20) == code
    assert worker.starts() == [
        f"{worker.folder}/w0/dsjax: train configs/tiny.py --run {worker.run} data.sources.0.path=/my texts"
    ]


def test_a_pod_whose_installation_fails_is_started_again(worker: Cloud) -> None:
    (command,) = [word.removeprefix("--command=") for word in workload(worker) if word.startswith("--command=")]
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        (worker.folder / "bin" / name).write_text("#!/bin/sh\nexit 1\n")
        (worker.folder / "bin" / name).chmod(0o755)
    folder = worker.folder / "w0/dsjax"
    said = subprocess.run(["bash", "-c", command], env=worker.env, cwd=folder, capture_output=True, timeout=30)
    assert said.returncode == 75


def test_every_command_of_the_page_is_accepted(cloud: Cloud) -> None:
    """The page from top to bottom, as one shell script, with every tool of the cloud faked."""
    page = (ROOT / "docs" / "pods.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    script = "\n".join(blocks)
    called = re.findall(r"^(?:\./)?(scripts/\w+)", script, re.MULTILINE)
    assert {"scripts/pod", "scripts/tpu_vm", "scripts/gke", "scripts/on_slice"} <= set(called)
    for tool in ("kubectl", "ssh-add", "pip", "sudo"):
        (cloud.folder / "bin" / tool).write_text("#!/bin/sh\nexit 0\n")
        (cloud.folder / "bin" / tool).chmod(0o755)
    script = script.replace("--run /runs/", f"--run {cloud.folder}/runs/")
    said = subprocess.run(
        ["bash", "-euc", script], env=cloud.env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert said.returncode == 0, said.stderr
    trained = [start for start in cloud.starts() if "--print-config" not in start]
    assert len(trained) == called.count("scripts/pod") + called.count("scripts/tpu_vm")
    assert all(f" --run {cloud.folder}/runs/" in start for start in trained)
    assert len(cloud.calls("queued-resources create")) == len(cloud.calls("queued-resources delete")) == len(trained)
