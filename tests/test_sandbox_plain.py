"""What travels between a judge and a program: all that is plain, exactly; nothing else; anybody's bytes do no harm."""

from __future__ import annotations

import collections
import decimal
import enum
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsjax.rl import plain

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**300), 2**300),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters()),  # surrogates too
    st.binary(),
    st.builds(bytearray, st.binary()),
    st.fractions(),
    st.decimals(allow_nan=False),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 9)),
)
KEYS = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()),
    lambda inner: st.one_of(st.lists(inner, max_size=3).map(tuple), st.frozensets(inner, max_size=3)),
    max_leaves=5,
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.lists(inner, max_size=4).map(collections.deque),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=4).map(collections.OrderedDict),
        st.dictionaries(KEYS, st.integers(), max_size=4).map(collections.Counter),
    ),
    max_leaves=15,
)


def there_and_back(x: Any, other: Any = None) -> Any:
    message = plain.pack(x, other)
    assert int.from_bytes(message[: plain.HEADER], "big") == len(message) - plain.HEADER
    return plain.unpack(message[plain.HEADER :])


def same(a: Any, b: Any) -> bool:
    """Equal, of equal types all the way down, NaN like NaN and -0.0 unlike 0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return math.isnan(a) == math.isnan(b) and (
            math.isnan(a) or (a, math.copysign(1, a)) == (b, math.copysign(1, b))
        )
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(map(same, a.items(), b.items()))  # in the same order too
    if isinstance(a, decimal.Decimal):
        return str(a) == str(b)
    if isinstance(a, (set, frozenset)):
        return a == b and collections.Counter(map(type, a)) == collections.Counter(map(type, b))
    return bool(a == b)


@given(PLAIN)
def test_what_is_plain_comes_back_exactly(x: Any) -> None:
    assert same(there_and_back(x), x)


class Number(int):
    pass


class Text(str):
    pass


class Pair(collections.namedtuple("Pair", "a b")):
    pass


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "x", [Number(1), Text("a"), Pair(1, 2), Colour.RED, object(), len, int, type("D", (dict,), {})()]
)
def test_what_is_not_plain_does_not_travel(x: Any) -> None:
    for around in (x, [x], (x,), {1: x}, [{"a": (x,)}]):
        with pytest.raises(plain.NotPlain, match="is not plain data"):
            plain.pack(around)
    assert plain.encode([x], lambda _: {"opaque": "it"}) == [{"opaque": "it"}]


def test_nan_equals_nan_in_what_arrives() -> None:
    def plain_nan() -> float:
        return float("nan")

    for make in (
        plain_nan,
        lambda: {"b": 1, "a": [plain_nan()]},
        lambda: {plain_nan(), 1, 2},
        lambda: {(plain_nan(), 1): 2},
        lambda: complex(1, plain_nan()),
        lambda: decimal.Decimal("NaN"),
    ):
        assert make() != make()
        assert [there_and_back(make())] == [there_and_back(make())]
    assert there_and_back({"b": 1, "a": plain_nan()}) == there_and_back({"a": plain_nan(), "b": 1})
    assert there_and_back([decimal.Decimal(1), plain_nan()]) == there_and_back([1, plain_nan()])
    assert there_and_back([plain_nan()]) != there_and_back([decimal.Decimal("NaN")])
    assert there_and_back(plain_nan()) != there_and_back(plain_nan())


def test_iterators_and_default_dicts() -> None:
    for x in (iter([1, (2,)]), {1: 1, 2: (2,)}.values()):
        with pytest.raises(plain.NotPlain, match="is not plain data"):  # one can be sent once, the other equals nothing
            plain.pack([x])
        assert list(there_and_back(x, str)) == [1, (2,)]
    assert list(there_and_back((x * x for x in range(3)), str)) == [0, 1, 4]
    for view in ({1: 2}.keys(), {1: [2]}.items()):
        assert (type(there_and_back(view)), there_and_back(view)) == (type(view), view)
    made = there_and_back(collections.defaultdict(list, {1: [2]}))
    assert (type(made), made) == (dict, {1: [2]})


def test_depth_has_an_end() -> None:
    deep: Any = 1
    for _ in range(plain.MOST_NESTED):
        deep = [deep]
    assert there_and_back(deep) == deep
    with pytest.raises(plain.NotPlain, match="nested"):
        plain.pack([deep])
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(plain.NotPlain, match="nested"):
        plain.pack(loop)


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"[",
            b"\xff",
            b"{}",
            b'{"a": 1, "b": 2}',
            b'{"nobody": 1}',
            b'{"tuple": 1}',
            b'{"tuple": {"list": []}}',
        ),
        *(
            b'{"dict": [1]}',
            b'{"dict": [[1]]}',
            b'{"dict": [[[], 1]]}',
            b'{"set": [[]]}',
            b'{"int": 1}',
            b'{"int": "z"}',
        ),
        *(b'{"float": "x"}', b'{"float": []}', b'{"bytes": "0"}', b'{"str": "ff"}', b'{"complex": [1, 2, 3]}'),
        *(b'{"Decimal": 1}', b'{"Decimal": "x"}', b'{"Fraction": [1, 0]}', b'{"Fraction": ["x"]}', b'{"items": [1]}'),
        *(b'{"complex": ["1", "2"]}', b'{"range": [1, 2, 0]}', b'{"range": ["a"]}', b"[" * 10**5, b"1" * 10**5),
        *(b"[" * 10**5 + b"]" * 10**5, b'{"function": "eval"}', b'{"__class__": "x"}', b'{"Counter": []}}'),
    ],
)
def test_other_bytes_are_refused(body: bytes) -> None:
    with pytest.raises(plain.Malformed):
        plain.unpack(body)


@given(
    st.one_of(
        st.binary(),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
            lambda inner: st.one_of(
                st.lists(inner),
                st.dictionaries(
                    st.sampled_from(
                        [
                            "int",
                            "float",
                            "str",
                            "bytes",
                            "tuple",
                            "set",
                            "dict",
                            "range",
                            "complex",
                            "deque",
                            "Counter",
                            "x",
                        ]
                    ),
                    inner,
                ),
            ),
        ).map(lambda x: json.dumps(x).encode()),
    )
)
def test_anybodys_bytes_give_plain_data_or_a_refusal(body: bytes) -> None:
    try:
        x = plain.unpack(body)
    except plain.Malformed:
        return
    plain.pack(x)  # so it is of the types that may travel, all the way down
