"""What a run reports: records that survive a crash, TensorBoard files, a picture, lines without a terminal."""

from __future__ import annotations

import json
import math
import os
import pathlib

import pytest
from tensorboardX.proto.event_pb2 import Event

from dsjax.config import UserError
from dsjax.metrics import MetricsLog, Progress, plot_loss, read_metrics, write_atomic

SO_FAR = {"tokens_seen": 64, "seconds": 1.5}  # what every record has
LINE = json.dumps({"step": 1, "loss": 3.0} | SO_FAR) + "\n"


def records_of(path: pathlib.Path) -> list[dict]:
    return list(read_metrics(path / "metrics.jsonl"))


# ---------------------------------------------------------------- metrics.jsonl


def test_records_come_back(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 2.5} | SO_FAR)
    log.write(2, {"loss": 2.25, "lr": 0.1} | SO_FAR)
    log.close()
    expected = [{"step": 1, "loss": 2.5} | SO_FAR, {"step": 2, "loss": 2.25, "lr": 0.1} | SO_FAR]
    assert records_of(tmp_path) == expected == log.records


def test_each_record_is_in_the_file_at_once(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 2.5} | SO_FAR)
    assert records_of(tmp_path) == [{"step": 1, "loss": 2.5} | SO_FAR]
    log.close()


def test_what_is_not_finite_is_null(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": math.nan, "norm": -math.inf, "lr": 0.5})
    log.close()
    strict = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "loss": None, "norm": None, "lr": 0.5}


@pytest.mark.parametrize("end", ['{"step": 2, "lo', '{"step": 2', "{", '"', "\x00\x00\x00", "2", '{"loss": 1.0}'])
def test_a_last_line_cut_short_is_left_out(end: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINE + end)
    assert records_of(tmp_path) == [json.loads(LINE)]


def test_a_last_line_that_is_not_utf_8_is_left_out(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(LINE.encode() + b'{"st\xff')
    assert records_of(tmp_path) == [json.loads(LINE)]


@pytest.mark.parametrize(
    "line",
    [
        '{"step', '{"step": 2}', '{"step": 2, "tokens_seen": 64}', '{"step": 2, "seconds": 1}',
        '{"step": 2, "tokens_seen": 64, "seconds": null}', '{"step": 2, "tokens_seen": null, "seconds": 1}',
        '{"step": 2, "tokens_seen": 64, "seconds": NaN}', '{"step": 2, "tokens_seen": 64, "seconds": "1"}',
        '{"step": 2, "tokens_seen": 64, "seconds": 1, "loss": true}', '{"step": 2.0, "tokens_seen": 64, "seconds": 1}',
    ],
)  # fmt: skip
def test_another_damaged_line_is_named(line: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{LINE}{line}\n{LINE}")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is no record of numbers with step, tokens_seen, seconds: '"):
        records_of(tmp_path)


def test_no_file_is_no_records(tmp_path: pathlib.Path) -> None:
    assert records_of(tmp_path) == []


def test_a_resumed_run_drops_what_lies_behind_its_step(tmp_path: pathlib.Path) -> None:
    lines = "".join(json.dumps({"step": step} | SO_FAR) + "\n" for step in (1, 5, 10, 15))
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 2')
    log = MetricsLog(tmp_path, resume_step=10)
    log.write(11, SO_FAR)
    log.close()
    assert [r["step"] for r in records_of(tmp_path)] == [1, 5, 10, 11]


def test_a_run_that_begins_anew_drops_everything(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(LINE)
    MetricsLog(tmp_path).close()
    assert records_of(tmp_path) == []


# ---------------------------------------------------------------- TensorBoard


def events(folder: pathlib.Path) -> list[Event]:
    """The events of TFRecord files: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_tensorboard_files_hold_the_values(tmp_path: pathlib.Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=True)
    log.write(5, {"loss": 2.5, "lr": 0.125})
    log.write(10, {"loss": 1.5})
    log.close()
    scalars = {(e.step, v.tag): v.simple_value for e in events(tmp_path / "tensorboard") for v in e.summary.value}
    assert scalars == {(5, "loss"): 2.5, (5, "lr"): 0.125, (10, "loss"): 1.5}


def test_tensorboard_is_told_which_steps_are_done_again(tmp_path: pathlib.Path) -> None:
    first = MetricsLog(tmp_path, tensorboard=True)
    first.write(5, {"loss": 2.5})
    first.close()
    resumed = MetricsLog(tmp_path, resume_step=5, tensorboard=True)
    resumed.close()
    starts = [e.step for e in events(tmp_path / "tensorboard") if e.session_log.status == 1]
    assert starts == [6]  # TensorBoard drops what it has from this step on; step 5 stays


# ---------------------------------------------------------------- files whole or not at all


def test_a_file_is_replaced_whole(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "report.md"
    for content in ("old", b"new"):
        write_atomic(path, content)
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_can_not_be_written_stays_as_it_was(
    call: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.md"
    write_atomic(path, "old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(UserError, match=r"report.md can not be written: No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


# ---------------------------------------------------------------- pictures and lines


def size_of_png(path: pathlib.Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_the_loss_is_drawn_beside_held_out_values(tmp_path: pathlib.Path) -> None:
    records = [{"step": i, "tokens_seen": 100 * i, "loss": 3 / i} for i in range(1, 5)]
    plot_loss(records, tmp_path / "loss.png", title="a run")
    one = size_of_png(tmp_path / "loss.png")
    records += [
        {"step": 4, "tokens_seen": 400, "held_out_bits_per_byte": 1.5},
        {"step": 5, "tokens_seen": 500, "loss": None},
    ]
    plot_loss(records, tmp_path / "both.png", lines={"xz": 2.0})
    two = size_of_png(tmp_path / "both.png")
    assert one[0] > 0
    assert two == (2 * one[0], one[1])


@pytest.mark.parametrize("title", ["$x^$", "a$b", "lr\\frac_{1}"])
def test_the_name_of_a_run_is_no_formula(title: str, tmp_path: pathlib.Path) -> None:
    plot_loss([{"step": 1, "tokens_seen": 1, "loss": 2.0}], tmp_path / "loss.png", title=title)
    assert (tmp_path / "loss.png").exists()


def test_nothing_to_draw_draws_nothing(tmp_path: pathlib.Path) -> None:
    plot_loss([{"step": 1, "tokens_seen": 1, "loss": None}], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_without_a_terminal_every_nth_update_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(7, label="reading", every=3) as progress:
        for done in range(1, 8):
            progress.update(done, 7, f"file {done}")
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split("  ")[:2] for line in said.err.splitlines()] == [
        ["reading 1/7", "file 1"], ["reading 4/7", "file 4"], ["reading 7/7", "file 7"],
    ]  # fmt: skip


def test_the_time_left_is_told_once_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(100, every=1) as progress:
        progress.update(1, 100)
        progress.update(50, 100)
    first, second = capsys.readouterr().err.splitlines()
    assert "left" not in first
    assert second.endswith("  0 s left")


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, every=1, quiet=True) as progress:
        progress.update(1, 2)
        progress.note("hello")
    assert capsys.readouterr() == ("", "")
