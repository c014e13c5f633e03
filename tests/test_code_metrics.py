"""pass@k, scores, BLEU and CodeBLEU, against enumeration and small cases worked out by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError
from dsjax.evals.code_bleu import code_bleu
from dsjax.evals.code_flow import Edge, Reaching, _Flow, data_flow
from dsjax.evals.code_scores import bleu, combined_score, parses, score, sentence_bleu
from dsjax.evals.code_trees import Node, parse, shapes, tokens
from dsjax.evals.pass_at_k import estimate, pass_at_k

# ---------------------------------------------------------------- pass@k


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_choices_with_a_right_sample(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        choices = list(itertools.combinations(range(n), k))
        share = Fraction(sum(any(i < c for i in choice) for choice in choices), len(choices))
        assert pass_at_k(n, c, k) == pytest.approx(float(share), abs=1e-15)  # a product of at most 7 factors near 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_pass_at_k_of_many_samples(n: int, data) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    # up to 2000 factors, each right to 2**-53, and no cancellation until the last subtraction
    assert pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-12)


def test_the_mean_over_draws_is_right() -> None:
    """Unbiased: over samples that are right with chance p, the mean is 1 - (1 - p)^k."""
    p, n, k = 0.3, 6, 3
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_intervals() -> None:
    # Clopper & Pearson's interval of 8 of 10 is in every table: 0.4439 to 0.9748.
    found = estimate([(1, 1)] * 8 + [(1, 0)] * 2, 1)
    assert (found.value, found.num_tasks, found.interval) == (0.8, 10, "Clopper-Pearson")
    assert (round(found.low, 4), round(found.high, 4)) == (0.4439, 0.9748)
    none = estimate([(5, 0)] * 10, 5)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 10))  # of no success the bound has a closed form
    assert estimate([(5, 5)] * 10, 5).high == 1.0
    rng = np.random.default_rng(0)
    results = [(10, int(c)) for c in rng.integers(0, 11, 200)]
    found = estimate(results, 1)
    values = np.array([c / 10 for _, c in results])
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / math.sqrt(200)
    # of 200 tasks the bootstrap is near the normal approximation; quantiles of 10,000 means add 2 %
    assert found.high - found.value == pytest.approx(half, rel=0.1)
    assert found.value - found.low == pytest.approx(half, rel=0.1)
    assert found == estimate(results, 1)
    assert str(found).startswith("pass@1 ")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pass_at_k(3, 1, 4), "k is 4; it must be from 1 to the number of samples of a task, 3"),
        (lambda: pass_at_k(3, 1, 0), "k is 0"),
        (lambda: pass_at_k(3, 4, 1), "4 of 3 samples"),
        (lambda: estimate([], 1), "pass@k of no task"),
        (lambda: score([], []), "0 programs have 0 results"),
        (lambda: score(["x"], [(2, 1)]), "2 of 1 tests"),
        (lambda: score(["x"], [(0, 0)]), "0 of 0 tests"),
        (lambda: bleu(["x"], []), "1 candidates are compared with 0 references"),
        (lambda: code_bleu([], []), "0 candidates"),
        (lambda: code_bleu(["x"], ["# nothing"]), "a reference holds no code"),
        (lambda: code_bleu(["x"], ["x"], (0, 0, 0, 0)), "the weights are (0, 0, 0, 0)"),
        (lambda: code_bleu(["x"], ["x"], (1, 1, 1, -1)), "the weights are (1, 1, 1, -1)"),
    ],
)
def test_mistakes_are_one_sentence(call, said: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- scores


def test_scores() -> None:
    found = score(["x = 1\n", "def f(:\n", "", "pass"], [(1, 2), (0, 4), (0, 1), (3, 3)])
    assert found.syntax == 0.5
    assert found.functional == pytest.approx((0.5 + 0 + 0 + 1) / 4)
    assert found.combined_score == pytest.approx(0.7 * 0.5 + 0.3 * 0.375)
    assert combined_score(1.0, 0.0) == 0.7
    assert combined_score(1.0, 1.0) == pytest.approx(1.0)
    assert not any(map(parses, ("  \n", "(" * 5000, "x = '\0'", "return )")))
    assert parses("x = '\\d'")


def test_bleu_is_sacrebleus() -> None:
    assert bleu(["return a + b"], ["return a + b"]) == pytest.approx(1.0)
    # 1-grams 4/5, 2-grams 3/4, 3-grams 2/3, 4-grams 1/2, of equal length
    expected = math.exp(sum(map(math.log, (4 / 5, 3 / 4, 2 / 3, 1 / 2))) / 4)
    assert bleu(["a b c d e"], ["a b c d f"]) == pytest.approx(expected)
    assert sentence_bleu("a b", "a b") == pytest.approx(1.0)
    assert sentence_bleu("x", "a b c d") < 0.2


# ---------------------------------------------------------------- CodeBLEU

LOOP = """def f(values, k):
    # why
    total = 0
    for v in values:
        if v > k:
            total += v
    return total
"""


def test_identical_programs_have_one() -> None:
    for code in (LOOP, "x = 1\n", "pass\n", "x", "def g():\n    return h(3)\n"):
        found = code_bleu([code], [code])
        assert (found.score, found.ngram, found.weighted_ngram) == (1.0, 1.0, 1.0)
        assert found.syntax in (1.0, None)
        assert found.dataflow in (1.0, None)
    assert code_bleu(["x = 1\n"], ["x = 1\n"]).dataflow is None


def test_comments_docstrings_and_layout_do_not_count() -> None:
    other = LOOP.replace("    # why\n", '    """Say why."""\n').replace("    ", "  ")
    assert code_bleu([other], [LOOP]).score == 1.0


def test_renamed_variables_keep_tree_and_flow() -> None:
    renamed = (
        LOOP.replace("total", "s")
        .replace("values", "xs")
        .replace("v ", "w ")
        .replace(" v\n", " w\n")
        .replace("k", "lim")
    )
    found = code_bleu([renamed], [LOOP])
    assert (found.syntax, found.dataflow) == (1.0, 1.0)
    assert found.ngram < 0.6


def test_another_variable_in_front_keeps_the_flow() -> None:
    """CodeXGLUE issue 104: there the rest of the variables get other numbers, and no edge matches."""
    found = code_bleu([LOOP.replace("    total = 0\n", "    unused = k\n    total = 0\n")], [LOOP])
    assert found.dataflow == 1.0


def test_changed_flow_is_seen() -> None:
    changed = LOOP.replace("return total", "return k")
    found = code_bleu([changed], [LOOP])
    assert found.syntax == 1.0
    assert found.dataflow is not None
    assert found.dataflow < 1.0


def test_weighted_and_plain_are_equal_without_keywords() -> None:
    """k4black/codebleu issues 52 and 85: there one is a recall and the other a precision."""
    found = code_bleu(["a.b(c, d, e)\nf.g(h)"], ["a.b(c, d)\nf.g(i)"])
    assert found.ngram == found.weighted_ngram


def test_keywords_count_five_times() -> None:
    # 1-grams: return a, of return b: the keyword is right, 5 of 6; unweighted 1 of 2. No 2-gram matches: 0.1 of 1.
    found = code_bleu(["return a"], ["return b"])
    assert found.ngram == pytest.approx(math.sqrt(1 / 2 * 0.1))
    assert found.weighted_ngram == pytest.approx(math.sqrt(5 / 6 * 0.1))


def test_brevity() -> None:
    reference = "a = f(b, c, d, e)"  # 12 tokens: a = f ( b , c , d , e )
    found = code_bleu(["a = f"], [reference])
    precisions = (1, 1, 1, 0.1)  # three tokens have no 4-gram: 0.1 of one
    assert found.ngram == pytest.approx(math.exp(1 - 12 / 3) * math.exp(sum(map(math.log, precisions)) / 4))


def test_subtrees_are_counted_as_often_as_they_are_there() -> None:
    """Twice the same call in the reference and once in the candidate is half, not all."""
    # module, 2 x (statement, call, arguments) against module, 1 x (...): the modules differ
    found = code_bleu(["f(1)"], ["f(1)\nf(1)"])
    assert found.syntax == pytest.approx(3 / 7)


def test_the_weights_are_shared_where_nothing_can_match() -> None:
    found = code_bleu(["x = 2"], ["x = 1"])
    assert found.dataflow is None
    assert found.score == pytest.approx((found.ngram + found.weighted_ngram + 1.0) / 3)
    assert code_bleu([LOOP], [LOOP.replace("0", "1")], (0, 0, 1, 0)).score == 1.0


def test_a_corpus_is_counted_as_one() -> None:
    both = code_bleu(["f(1)", "g"], ["f(1)", "h(2)"])
    # of 1 + 1 programs: f(1) has module, statement, call, arguments = 4 of 4; g has none of h(2)'s 4
    assert both.syntax == pytest.approx(4 / 8)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.sampled_from([LOOP, "x = y", "class A:\n    pass"]))
def test_anything_can_be_compared(text: str, reference: str) -> None:
    found = code_bleu([text], [reference])
    for part in (found.score, found.ngram, found.weighted_ngram, found.syntax, found.dataflow):
        assert part is None or 0.0 <= part <= 1.0
    assert found == code_bleu([text], [reference])


@pytest.mark.parametrize(
    "text",
    ["(" * 20000, "[" * 5000 + "]" * 5000, "x = " + "-" * 5000 + "1", "f(" * 3000, "\ud800", "\0", "if x:\n" * 500],
)
def test_hostile_programs_are_compared_too(text: str) -> None:
    assert 0.0 <= code_bleu([text], [LOOP]).score < 0.5


def test_tokens() -> None:
    assert tokens(parse("x = 'a b'  # no\nif x: pass\n")) == ["x", "=", "'a b'", "if", "x", ":", "pass"]
    assert tokens(parse('def f():\n    """Doc."""\n    return "text"\n')) == [
        "def",
        "f",
        "(",
        ")",
        ":",
        "return",
        '"text"',
    ]
    assert tokens(parse("# only\n")) == []


def test_shapes_know_kinds_and_not_names() -> None:
    known: dict = {}
    assert shapes(parse("a = b + 1"), known) == shapes(parse("x = yy + 22"), known)
    assert shapes(parse("a = b + 1"), known) != shapes(parse("a = b(1)"), known)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\ny = x\n", {("x", "from", "x"): 1, ("y", "computed", "x"): 1}),
        ("x = a\nprint(x, x)", {("x", "from", "x"): 2}),
        ("x = 1\nx += 2", {("x", "from", "x"): 1, ("x", "computed", "x"): 1}),
        ("x = 1\nif c:\n    x = 2\nf(x)", {("x", "from", "x"): 2}),
        ("x = 1\nif c:\n    x = 2\nelse:\n    x = 3\nf(x)", {("x", "from", "x"): 2}),
        ("x = 0\nwhile x:\n    x = f(x)", {("x", "from", "x"): 4, ("x", "computed", "x"): 1}),
        (
            "a, b = 1, 2\na, b = b, a",
            {("a", "from", "a"): 1, ("b", "from", "b"): 1, ("a", "computed", "b"): 1, ("b", "computed", "a"): 1},
        ),
        ("x = []\nx[0] = 3\nf(x)", {("x", "from", "x"): 2, ("x", "computed", "x"): 1}),
        ("def f(p, q=1):\n    return p.q + g(q=p)", {("p", "from", "p"): 2}),
        ("s = [t for t in u if t]", {("t", "from", "t"): 2}),
        ("import os as o\no.x", {("o", "from", "o"): 1}),
        ("with f() as g:\n    g", {("g", "from", "g"): 1}),
        ("if (n := f()):\n    n", {("n", "from", "n"): 1}),
        ("try:\n    x = 1\nexcept E as e:\n    h(e)", {("e", "from", "e"): 1}),
        ("print(undefined)", {}),
    ],
)
def test_data_flow(code: str, expected: dict) -> None:
    edges, _ = data_flow(parse(code))
    assert dict(edges) == {Edge(*key): count for key, count in expected.items()}


def test_data_flow_of_nested_loops_takes_time_that_does_not_double_with_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    depth, walks, walk = 12, [], _Flow._loop

    def counted(flow: _Flow, node: Node, env: Reaching) -> Reaching:
        walks.append(node)
        return walk(flow, node, env)

    monkeypatch.setattr(_Flow, "_loop", counted)
    loops = [f"{' ' * n}for x{n} in a:\n" for n in range(depth)]
    edges, names = data_flow(parse("a = 0\n" + "".join(loops) + " " * depth + "a = 1\n"))
    assert edges == {Edge("a", "from", "a"): 2 * depth} | {Edge(f"x{n}", "computed", "a"): 1 for n in range(depth)}
    assert names == ["a", *(f"x{n}" for n in range(depth))]
    assert len(walks) <= depth**2
