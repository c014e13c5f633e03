"""``dsjax generate``: what it prints of a run and of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import types
from typing import Any

import jax
import pytest
from models import graph, weights

from dsjax.cli import run as cli
from dsjax.config import UserError
from dsjax.data.chat import ChatTemplate
from dsjax.data.tokenizer import Tokenizer, train_tokenizer
from dsjax.infer import command
from dsjax.infer.batching import Engine
from dsjax.infer.command import Options, run
from dsjax.infer.requests import Completion, Request
from dsjax.infer.sampling import SamplingConfig
from dsjax.models.decoder import DecoderConfig, LayerGroup
from dsjax.models.multi_token import MultiTokenConfig
from dsjax.nn.attention import AttentionConfig
from dsjax.nn.mlp import MLPConfig
from dsjax.sharding import MeshConfig, make_mesh

WORDS = "the cat sat on the mat; the dog né 深 lay by the door\n" * 40
CONFIG = DecoderConfig(300, 16, 2, (LayerGroup(MLPConfig(d_ff=24), AttentionConfig(4, 2, 8)),))
GREEDY, HOT = SamplingConfig(0.0), SamplingConfig(1.5, 0, 1.0)


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS], 300, ("<|user|>",))


def model(**changes: Any) -> types.SimpleNamespace:
    template = ChatTemplate("{% for m in messages %}{{ '<|user|>' + m.content + '\n' }}{% endfor %}")
    fields = {
        "graph": graph(CONFIG),
        "params": weights(CONFIG),
        "tokenizer": tokenizer(),
        "end_ids": (tokenizer().end_id,),
        "max_length": 96,
        "templates": {"default": template},
        "mesh": make_mesh(MeshConfig(), jax.devices()[:1]),
    }
    return types.SimpleNamespace(**fields | changes)


def expected(prompt: list[int], **options: Any) -> list[Completion]:
    """What the engine itself makes of a prompt."""
    of = model()
    made = Engine(of.graph, of.params, end_ids=of.end_ids, max_length=96, batch_size=2, tokenizer=tokenizer())
    number = made.submit(Request(prompt, **options))
    return made.run()[number]


def printed(capsys: pytest.CaptureFixture[str], options: Options, **changes: Any) -> tuple[str, str]:
    options.check()
    run(model(**changes), options)
    said = capsys.readouterr()
    return said.out, said.err


PROMPT = "the cat"
IDS = [0, *tokenizer().encode(PROMPT).tolist()]


def test_a_continuation_stands_behind_its_prompt_and_the_speed_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = printed(capsys, Options(PROMPT, max_tokens=12, sampling=GREEDY))
    (want,) = expected(IDS, max_tokens=12, sampling=GREEDY)
    assert out == PROMPT + want.text + "\n"
    number = len(want.tokens)
    assert err.startswith(f"{number} tokens: first token after ")
    assert err.endswith(" tokens/s\n")
    assert printed(capsys, Options(PROMPT, max_tokens=12, sampling=GREEDY, quiet=True)) == (out, "")


def test_a_healed_prompt_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, Options("the c", max_tokens=12, sampling=HOT, heal=True))
    assert out.startswith("the c")
    ids = [0, *tokenizer().encode("the c").tolist()]
    (want,) = expected(ids[:-1], max_tokens=12, sampling=HOT, first_tokens=tokenizer().extensions(ids[-1]))
    assert out == tokenizer().decode([*ids[:-1], *want.tokens]) + "\n"


def test_samples_come_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, Options(PROMPT, n=3, max_tokens=8, sampling=HOT, seed=4))
    want = expected(IDS, num_samples=3, max_tokens=8, sampling=HOT, seed=4)
    assert len({sample.text for sample in want}) == 3
    assert out == "".join(f"--- sample {i} of 3\n{PROMPT}{sample.text}\n" for i, sample in enumerate(want, 1))


def test_a_sample_that_ends_at_once_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = printed(capsys, Options(PROMPT, chat=True, n=2, max_tokens=8, sampling=HOT), end_ids=range(300))
    assert out == "--- sample 1 of 2\n\n--- sample 2 of 2\n\n"


def test_json_has_a_line_for_each_sample(capsys: pytest.CaptureFixture[str]) -> None:
    (stop,) = {sample.text[3:5] for sample in expected(IDS, max_tokens=8, sampling=GREEDY)}
    out, _ = printed(capsys, Options(PROMPT, n=2, max_tokens=8, sampling=GREEDY, stop=(stop,), json=True))
    lines = [json.loads(line) for line in out.splitlines()]
    want = expected(IDS, num_samples=2, max_tokens=8, sampling=GREEDY, stop=(stop,))
    assert sorted(line["sample"] for line in lines) == [0, 1]
    for line in lines:
        of = want[line.pop("sample")]
        assert line == {"text": of.text, "tokens": of.tokens, "log_probs": of.log_probs, "finish": "stop"}


def test_drafts_change_no_text_and_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(CONFIG, multi_token=MultiTokenConfig())
    drafting = {"graph": graph(config), "params": weights(config)}
    asked = Options(PROMPT, n=2, max_tokens=12, sampling=HOT)
    plain, _ = printed(capsys, asked, **drafting)
    out, err = printed(capsys, dataclasses.replace(asked, draft=2), **drafting)
    assert out == plain
    told = re.search(r"; accepted (\d+)% of 2 drafts a step, (\d\.\d) tokens a step\n$", err)
    assert told
    out, _ = printed(capsys, dataclasses.replace(asked, draft=2, json=True), **drafting)
    drafted, accepted, steps = (
        sum(json.loads(line)[name] for line in out.splitlines()) for name in ("drafted", "accepted", "steps")
    )
    assert drafted == 2 * steps
    assert (told[1], told[2]) == (f"{100 * accepted / drafted:.0f}", f"{1 + accepted / steps:.1f}")
    with pytest.raises(UserError, match="draft is 2, but the model has no module of multi-token prediction"):
        printed(capsys, dataclasses.replace(asked, draft=2))
    with pytest.raises(UserError, match="--draft is -1; it must be at least 0"):
        Options(PROMPT, draft=-1).check()


def test_a_chat_is_written_down_by_the_template(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options("hi <|user|>", chat=True, system="be a cat", max_tokens=9, sampling=GREEDY)
    out, _ = printed(capsys, options)
    user, encode = tokenizer().special_ids["<|user|>"], tokenizer().encode
    ids = [user, *encode("be a cat\n").tolist(), user, *encode("hi <|user|>\n").tolist()]
    (want,) = expected(ids, max_tokens=9, sampling=GREEDY)
    assert out == want.text + "\n"


def test_devices_are_used_as_the_model_lies(capsys: pytest.CaptureFixture[str]) -> None:
    options = Options(PROMPT, n=3, max_tokens=6, sampling=HOT)
    mesh = make_mesh(MeshConfig(data=4, tensor=2))
    assert printed(capsys, options, mesh=mesh)[0] == printed(capsys, options)[0]


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({"tokenizer": None}, {}, "has no tokenizer.json"),
        ({"templates": {}}, {"chat": True}, "--chat: the model has no chat template"),
        (
            {"templates": {"rag": 1, "tool_use": 2}},
            {"chat": True},
            "no chat template is the default; there are rag, tool_use",
        ),
        ({}, {"prompt": "the cat" * 60}, "a prompt has .* tokens; the model holds 96 with what it generates"),
    ],
)
def test_what_a_model_can_not_do_is_said(changes: dict, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(model(**changes), Options(**options))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--n", "0"], "--n is 0; it must be at least 1"),
        (["--stop", ""], "--stop is empty"),
        (["--system", "a"], "--system goes with --chat"),
        (["--min-p", "2"], "--min-p is 2.0"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--dtype", "float16"], "--dtype"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["generate", "nowhere", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_the_words_of_the_command_line_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    import dsjax.loaded

    found: list[Any] = []
    monkeypatch.setattr(dsjax.loaded, "load", lambda path, **how: found.append((path, how)))
    monkeypatch.setattr(command, "run", lambda model, options, since: found.append(options))
    words = [
        "--prompt",
        "a",
        "--chat",
        "--system",
        "b",
        "--max-tokens",
        "3",
        "--n",
        "4",
        "--stop",
        "c",
        "--stop",
        "d e",
    ]
    words += ["--temperature", "0.5", "--top-k", "6", "--top-p", "0.7", "--min-p", "0.1", "--seed", "9", "--json"]
    assert cli(["generate", str(tmp_path), *words, "--quiet", "--mesh", "data=1", "--dtype", "bfloat16"]) == 0
    (path, how), options = found
    assert (path, how) == (str(tmp_path), {"dtype": "bfloat16", "mesh": "data=1"})
    sampling = SamplingConfig(0.5, 6, 0.7, 0.1)
    assert options == Options("a", True, "b", 3, 4, ("c", "d e"), sampling, 9, False, True, True)
