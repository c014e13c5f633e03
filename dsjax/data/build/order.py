"""Files in the order in which they can be read: what is needed comes first (DeepSeek-Coder, section 2.2).

Groups of files that need each other (strongly connected components, Tarjan 1972) come in topological order, and what a
file needs comes as late as it can: the search goes depth first, so a file stands near what it needs. A cycle is opened
first at imports that do not bind, then, as in DeepSeek-Coder's algorithm, at the file that needs least of the others.
Ties are broken by name: the order depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping


def ordered(needs: Mapping[str, Mapping[str, bool]]) -> list[str]:
    """All files, each behind those it needs, but where they need each other.

    Args:
        needs: file -> {file that it needs: whether that binds}; every file is a key.
    """
    out: list[str] = []
    for group in components(needs, needs):
        out += group if len(group) == 1 else _opened(group, needs)
    return out


def _opened(group: list[str], needs: Mapping[str, Mapping[str, bool]]) -> list[str]:
    """The order of files that need each other."""
    inside = set(group)
    binding = {name: {n: True for n, binds in needs[name].items() if binds and n in inside} for name in group}
    out: list[str] = []
    for part in components(group, binding):
        out += part if len(part) == 1 else _least_first(part, binding)
    return out


def _least_first(group: Collection[str], needs: Mapping[str, Mapping[str, bool]]) -> list[str]:
    """Again and again the file that needs the fewest of those that are left."""
    left, out = set(group), list[str]()
    while left:
        name = min(left, key=lambda n: (sum(other in left for other in needs[n]), n))
        left.remove(name)
        out.append(name)
    return out


def components(names: Iterable[str], needs: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """Strongly connected components, each sorted, one behind those that it needs; without recursion.

    Names that are needed and not in ``names`` are ignored.
    """
    known = sorted(names)
    allowed = set(known)
    found: list[list[str]] = []
    number: dict[str, int] = {}  # in order of discovery
    low: dict[str, int] = {}  # the least number that is reached, of files that have no component yet
    waiting: list[str] = []
    is_waiting: set[str] = set()
    for start in known:
        if start in number:
            continue
        path = [(start, iter(sorted(needs[start])))]
        number[start] = low[start] = len(number)
        waiting.append(start)
        is_waiting.add(start)
        while path:
            name, rest = path[-1]
            child = next((c for c in rest if c in allowed), None)
            if child is None:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[name])
                if low[name] == number[name]:
                    group = [waiting.pop()]
                    while group[-1] != name:
                        group.append(waiting.pop())
                    is_waiting -= set(group)
                    found.append(sorted(group))
            elif child not in number:
                path.append((child, iter(sorted(needs[child]))))
                number[child] = low[child] = len(number)
                waiting.append(child)
                is_waiting.add(child)
            elif child in is_waiting:
                low[name] = min(low[name], number[child])
    return found
