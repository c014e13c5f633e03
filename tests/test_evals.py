"""Bits per byte, function bodies, and the report."""

from __future__ import annotations

import ast
import json
import os
import pathlib

import numpy as np
import pytest
from models import DENSE, EVERYTHING, V, graph, logits, weights

from dsjax.data.prepare import HeldOut
from dsjax.evals.bits import bits_per_byte, document_bits
from dsjax.evals.functions import function_prompts, parses, wilson_interval
from dsjax.evals.report import markdown
from dsjax.rl.completions import cut_body
from dsjax.runs import RunFolder


def held_out(*ids: list[int]) -> tuple[HeldOut, ...]:
    return tuple(HeldOut(f"d{i}", "x" * (3 + i), np.array(x, np.int32)) for i, x in enumerate(ids))


@pytest.mark.parametrize("cfg", [DENSE, EVERYTHING], ids=["dense", "everything"])
def test_document_bits_are_those_of_the_full_context_when_it_fits(cfg) -> None:
    documents = held_out([3, 1, 4, 1, 5], [2], [])
    params = weights(cfg)
    got = document_bits(graph(cfg), params, documents, seq_len=8, end_id=0, batch_size=2)
    for document, bits in zip(documents, got, strict=True):
        stream = np.array([0, *document.ids, 0])
        scores = logits(cfg, params, stream[None, :-1])[0].astype(np.float64)
        log_p = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        assert bits == pytest.approx(-log_p[np.arange(len(stream) - 1), stream[1:]].sum() / np.log(2), rel=1e-4)


def test_a_long_document_is_counted_once_in_overlapping_windows() -> None:
    params = weights(DENSE)
    zero = {**params, "w_logits": params["w_logits"] * 0}  # a uniform model: log2 V bits a token, in any window
    documents = held_out(list(range(1, 30)))
    got = document_bits(graph(DENSE), zero, documents, seq_len=8, end_id=0, context=3, batch_size=2)
    assert got[0] == pytest.approx(30 * np.log2(V), rel=1e-5)


def test_bits_per_byte_weighs_documents_by_their_bytes() -> None:
    documents = held_out([1], [1])  # 3 and 4 bytes
    value, half = bits_per_byte(np.array([3.0, 8.0]), documents)
    assert value == pytest.approx(11 / 7)
    assert 0 < half <= 0.5  # resamples lie between 1 and 2


SOURCE = '''
class A:
    def first(self, x):
        """Doc."""
        if x:
            return 1
        return 2

    def stub(self): pass

async def second(a,
                 b):
    return a + b
'''


def test_function_prompts_hold_everything_up_to_the_body() -> None:
    found = {p.name: p for p in function_prompts((HeldOut("m.py", SOURCE, np.zeros(1, np.int32)),), 10)}
    assert set(found) == {"m.py:first", "m.py:second"}  # one-line bodies leave nothing to write
    first = found["m.py:first"]
    assert first.context == SOURCE[: SOURCE.index("        if x:")]
    assert first.head == '    def first(self, x):\n        """Doc."""\n'
    assert first.indent == 4
    assert first.body == "        if x:\n            return 1\n        return 2\n"
    assert found["m.py:second"].head == "async def second(a,\n                 b):\n"
    assert all(parses(p, p.body) for p in found.values())


def test_bodies_are_cut_at_the_line_that_they_begin_at() -> None:
    head = "@deco(\n    1)\ndef f(x):\n    'doc'\n"
    body = "    @a(\n        1)\n    @b\n    def g(): return x\n    return g\n"
    others = "def one(a,\n    b): return a\n\ndef two(a):\n    'doc'; return a\n"
    text = f"import a\n\f\n{others}\n{head}{body}"
    (prompt,) = function_prompts((HeldOut("m.py", text, np.zeros(1, np.int32)),), 10)
    assert (prompt.head, prompt.body) == ("def f(x):\n    'doc'\n", body)
    assert prompt.context + prompt.body == text


@pytest.mark.parametrize(
    ("text", "ended", "want"),
    [
        ("    return 1\n\nx = 2\n", False, ("    return 1\n\n", True)),
        ("    return 1\n# note\n    y\nx = 2\n", False, ("    return 1\n# note\n    y\n", True)),
        ("    return 1\n    y = foo(", False, ("    return 1\n", False)),  # the cut line is not judged
        ("    return 1\n    y = foo(", True, ("    return 1\n    y = foo(", True)),
        ("    return 1\nx", False, ("    return 1\nx"[:13], False)),  # too short to tell a dedent from a cut
        ('    s = """\nhello\n"""\n    return s\nx = 2\n', False, ('    s = """\nhello\n"""\n    return s\n', True)),
        ("    x = f(\na,\n)\n    return x\n", True, ("    x = f(\na,\n)\n    return x\n", True)),
        ("    x = 1 + \\\n1\nx\n", False, ("    x = 1 + \\\n1\n", True)),
        ("    x = 'a\nx\n", False, ("    x = 'a\n", True)),  # no string goes on behind its line
        ("    x = 'a\u2028b'\n", True, ("    x = 'a\u2028b'\n", True)),
    ],
)
def test_a_body_ends_at_the_first_dedent(text: str, ended: bool, want: tuple[str, bool]) -> None:
    assert cut_body(text, 0, ended=ended) == want


@pytest.mark.parametrize(
    ("body", "good"),
    [
        ("        return x\n", True),
        ("        return (\n", False),
        ("", False),
        ("    return x\n", False),
        ("        return x\n        def g(:\n", False),
    ],
)
def test_parses_judges_signature_and_body_together(body: str, good: bool) -> None:
    prompt = function_prompts((HeldOut("m.py", SOURCE, np.zeros(1, np.int32)),), 10)
    first = next(p for p in prompt if p.name == "m.py:first")
    assert parses(first, body) is good


def test_wilson_interval_of_known_cases() -> None:
    assert wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)


def test_the_report_shows_samples_as_python() -> None:
    report = {
        "step": 3, "num_params": 10, "tokens_seen": 20, "held_out_documents": 1, "held_out_bytes": 9,
        "gain_over_ngram": 0.1, "gain_over_ngram_half_interval": 0.01, "parse_share": 0.5, "parse_samples": 2,
        "parse_share_interval": (0.1, 0.9), "ngram_parse_share": 0.0, "real_parse_share": 1.0,
        "tokens_per_second": 1000.0, "training_seconds": 1.0, "evaluation_seconds": 2.0,
        "samples": [{"name": "m.py:f", "prompt": "def f():\n", "body": "    return 1\n"}],
    }  # fmt: skip
    for key in ("", "ngram_", "xz_"):
        report |= {f"{key}bits_per_byte": 1.5, f"{key}bits_per_byte_half_interval": 0.1}
    run = RunFolder(pathlib.Path(os.fsdecode(b"runs/etud\xe9")))
    text = markdown(json.loads(json.dumps(report)), run.name)
    assert text.encode().startswith(rb"# etud\udce9: step 3")
    code = text.split("```python\n")[1].split("```")[0]
    assert ast.parse(code).body[0].name == "f"
    assert "10.0% below the 5-gram" in text
