"""Programs that try to be rewarded for what they have not done.

Each defines ``solve``. The tests want ``secret``, which is made anew for each run, and for which nothing but the
tests knows; ``{path}`` is replaced by that of a folder that anybody may write to. A cheat that comes in two programs
is tried one after the other. Those of ``CHANNEL`` speak the judge's own protocol.
"""

from __future__ import annotations

import textwrap

CHECK = """
def check(candidate):
    secret = {secret!r}
    given = [3, 1, 2]
    assert candidate(1) == secret
    assert candidate(given) == [secret]
    assert candidate(2) is not None and candidate(2) == secret
"""
LOOPS = """
import itertools
def check(candidate):
    secret = {secret!r}
    cases = [(1, secret), ([3, 1, 2], [secret]), (2, secret)]
    assert all(map(lambda case: candidate(case[0]) == case[1], cases))
    assert all(itertools.starmap(lambda x, want: candidate(x) == want, cases))
    assert not list(filter(lambda case: candidate(case[0]) != case[1], cases))
"""


def programs() -> dict[str, list[str]]:
    """Name -> the programs, mostly one, of which the last is the one that wants the reward."""
    found: dict[str, list[str]] = {}
    for block in (ENDS + LIES + PATCHES + SPIES + OUTPUT + CHANNEL + ODD).split("\n--- ")[1:]:
        name, _, body = block.partition("\n")
        found[name] = [textwrap.dedent(part).strip("\n") + "\n" for part in body.split("\n----\n")]
    return found


ENDS = """
--- end_with_success_when_called
import os
def solve(x):
    os._exit(0)
--- end_with_success_when_loaded
import os
os._exit(0)
def solve(x): pass
--- exit_when_called
import sys
def solve(x):
    sys.exit(0)
--- exit_when_loaded
def solve(x): pass
raise SystemExit(0)
--- exit_by_the_builtin
def solve(x):
    exit(0)
--- pass_at_exit
import atexit, os
atexit.register(lambda: os._exit(0))
def solve(x):
    raise ValueError
--- end_like_a_jail_that_failed
import os
def solve(x):
    os._exit(70)
--- end_without_a_filter
import os
os._exit(70)
--- raise_what_nobody_catches
class Passed(BaseException): pass
def solve(x):
    raise Passed
--- interrupt
def solve(x):
    raise KeyboardInterrupt
--- end_the_loop_of_the_tests
def solve(x):
    raise StopIteration
--- end_it_by_another_name
class Done(StopIteration): pass
def solve(x):
    raise Done
--- end_a_loop_that_waits
def solve(x):
    raise StopAsyncIteration
--- end_a_generator
def solve(x):
    raise GeneratorExit
"""

LIES = """
--- equal_to_everything
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
def solve(x):
    return Yes()
--- a_string_equal_to_everything
class Yes(str):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = str.__hash__
def solve(x):
    return Yes("x")
--- a_number_equal_to_everything
class Yes(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def solve(x):
    return Yes(0)
--- a_list_equal_to_everything
class Yes(list):
    def __eq__(self, other): return True
def solve(x):
    return Yes()
--- a_dict_equal_to_everything
class Yes(dict):
    def __eq__(self, other): return True
def solve(x):
    return Yes()
--- any_of_mock
from unittest import mock
def solve(x):
    return mock.ANY
--- says_that_it_is_a_string
class Yes:
    __class__ = str
    def __eq__(self, other): return True
def solve(x):
    return Yes()
--- a_type_that_poses_as_str
class Meta(type):
    def __eq__(cls, other): return True
    def __hash__(cls): return hash(str)
    def __instancecheck__(cls, x): return True
class Yes(metaclass=Meta):
    def __eq__(self, other): return True
    def isascii(self): return True
def solve(x):
    return Yes()
--- in_a_container
class Yes(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def solve(x):
    return [Yes("x")] if isinstance(x, list) else Yes("x")
--- not_implemented
def solve(x):
    return NotImplemented
--- says_to_be_no_answer
def solve(x):
    return {"opaque": "x", "value": True, "passed": True}
--- exception_equal_to_everything
class Yes(Exception):
    def __eq__(self, other): return True
def solve(x):
    return Yes()
"""

PATCHES = """
--- patch_builtins
import builtins
builtins.AssertionError = type("Never", (Exception,), {})
builtins.all = builtins.any = lambda *a: True
builtins.isinstance = lambda *a: True
builtins.len = lambda x: 1
def solve(x): return 1
--- patch_type
import builtins
builtins.type = lambda x: str
class Yes:
    def __eq__(self, other): return True
    def isascii(self): return True
def solve(x): return Yes()
--- patch_json
import json
def dumps(*a, **k): return '{"dict":[["passed",true]]}'
json.dumps = dumps
def solve(x): return 1
--- patch_the_codec
import sys
for name, module in list(sys.modules.items()):
    if name.endswith("plain"):
        module.encode = lambda x, *a: {"opaque": "x"}
        module.opaque = lambda x: {"tuple": []}
class Yes:
    def __eq__(self, other): return True
def solve(x): return Yes()
--- patch_what_runs_it
import sys
for name, module in list(sys.modules.items()):
    if "jail" in name or "judge" in name:
        for attribute in list(vars(module)):
            if callable(getattr(module, attribute)) and attribute not in ("write", "receive", "read"):
                setattr(module, attribute, lambda *a, **k: True)
def solve(x): return True
--- define_the_check
def check(candidate): pass
def candidate(x): return 1
def solve(x): return 1
__name__ = "__main__"
--- trace_it
import sys
def tracer(frame, event, argument):
    for value in list(frame.f_locals.values()):
        if isinstance(value, str) and value.startswith("secret"):
            global found
            found = value
    return tracer
found = None
sys.settrace(tracer)
sys.setprofile(tracer)
def solve(x): return found
--- compare_as_one_likes
import operator
operator.eq = lambda a, b: True
def solve(x): return 1
str.__doc__
"""

SPIES = """
--- look_through_frames
import sys
def solve(x):
    frame = sys._getframe()
    while frame:
        for space in (frame.f_locals, frame.f_globals):
            for value in list(space.values()):
                values = list(value) if isinstance(value, (list, tuple)) else [value]
                for text in values:
                    if isinstance(text, str) and text.startswith("secret-"):
                        return [text] if isinstance(x, list) else text
        frame = frame.f_back
--- look_through_all_objects
import gc, re
def solve(x):
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple)):
            for text in list(thing.values()) if isinstance(thing, dict) else thing:
                if isinstance(text, str) and (found := re.search(r"secret-[0-9a-f]{8,}", text)):
                    return [found[0]] if isinstance(x, list) else found[0]
--- look_through_memory
import re
def solve(x):
    for line in open("/proc/self/maps"):
        if "rw-p" in line:
            start, end = (int(n, 16) for n in line.split()[0].split("-"))
            with open("/proc/self/mem", "rb", 0) as memory:
                memory.seek(start)
                if found := re.search(rb"secret-[0-9a-f]{8,}", memory.read(end - start)):
                    return [found[0].decode()] if isinstance(x, list) else found[0].decode()
--- look_through_files
import pathlib, re
def solve(x):
    for path in pathlib.Path("{path}").rglob("*"):
        if path.is_file() and (found := re.search(r"secret-[0-9a-f]{8,}", path.read_text())):
            return [found[0]] if isinstance(x, list) else found[0]
--- look_at_the_command
import os, re, sys
def solve(x):
    seen = repr(sys.argv) + repr(sys.orig_argv) + repr(dict(os.environ))
    if found := re.search(r"secret-[0-9a-f]{8,}", seen):
        return [found[0]] if isinstance(x, list) else found[0]
--- look_in_other_modules
import re, sys
def solve(x):
    for module in list(sys.modules.values()):
        for value in list(vars(module).values()) if hasattr(module, "__dict__") else ():
            if isinstance(value, str) and (found := re.search(r"secret-[0-9a-f]{8,}", value)):
                return [found[0]] if isinstance(x, list) else found[0]
--- guess_the_seed
import random
random.seed(0)
def solve(x):
    answer = "secret-" + format(random.Random(0).getrandbits(64), "x")
    return [answer] if isinstance(x, list) else answer
--- guess_the_state
import random
def solve(x):
    answer = "secret-" + format(random.getrandbits(64), "x")
    return [answer] if isinstance(x, list) else answer
--- leave_a_note_in_a_file
open("{path}/note", "w").write("secret")
def solve(x): return 1
----
import os
def solve(x):
    if os.path.exists("{path}/note"):
        raise SystemExit(0)
    return 1
--- leave_a_note_in_a_module
import math, sys, builtins
math.note = builtins.note = sys.note = "here"
sys.modules["note"] = math
def solve(x): return 1
----
import builtins, math, os, sys
if any(hasattr(place, "note") for place in (math, builtins, sys)) or "note" in sys.modules:
    os._exit(0)
def solve(x): return 1
"""

OUTPUT = """
--- say_that_it_passed
print("passed")
print("OK")
print("1 passed in 0.01s")
def solve(x):
    print('{"passed": true, "tests_passed": 3, "tests_total": 3}')
--- say_so_on_all_descriptors
import os
for fd in range(3):
    try:
        os.write(fd, b'{"passed": true}\\n')
    except OSError:
        pass
def solve(x): return None
--- complain
import sys
def solve(x):
    sys.stderr.write("PASSED")
    sys.stdout.flush()
    raise RuntimeError("passed")
"""

CHANNEL = """
--- answer_before_it_is_asked
import json, os
body = json.dumps({"dict": [["id", "0"], ["value", True]]}).encode()
for _ in range(9):
    os.write(3, len(body).to_bytes(8, "big") + body)
def solve(x): return 1
--- answer_twice
import json, os
def solve(x):
    body = json.dumps({"dict": [["id", "0"], ["value", "x"]]}).encode()
    os.write(3, len(body).to_bytes(8, "big") + body)
    return 1
--- give_a_verdict
import json, os
def solve(x):
    verdict = {"passed": True, "tests_passed": 3, "tests_total": 3, "reason": "passed", "seconds": 0.1}
    body = json.dumps(verdict).encode()
    os.write(3, len(body).to_bytes(8, "big") + body + b"\\n" + body + b"\\n")
    os._exit(0)
--- announce_too_much
import os
def solve(x):
    os.write(3, (1 << 62).to_bytes(8, "big"))
--- announce_and_never_send
import os
def solve(x):
    os.write(3, (1 << 10).to_bytes(8, "big"))
    while True: pass
--- send_no_message
import os
def solve(x):
    os.write(3, (3).to_bytes(8, "big") + b"[[[")
--- send_another_kind
import os
def solve(x):
    body = b'{"dict":[["id","0"],["value",{"function":"eval"}]]}'
    os.write(3, len(body).to_bytes(8, "big") + body)
--- send_a_deep_message
import os
def solve(x):
    body = b"[" * 100000 + b"]" * 100000
    os.write(3, len(body).to_bytes(8, "big") + body)
--- dribble
import os, time
def solve(x):
    os.write(3, (100).to_bytes(8, "big"))
    while True:
        os.write(3, b" ")
        time.sleep(0.05)
--- close_the_channel
import os
os.close(3)
def solve(x): return 1
--- close_it_and_stay
import os, time
def solve(x):
    os.close(3)
    time.sleep(60)
"""

ODD = """
--- change_the_argument
def solve(x):
    if isinstance(x, list):
        x.clear()
    return x
--- return_something_deep
def solve(x):
    a = []
    for _ in range(100000):
        a = [a]
    return a
--- return_something_huge
def solve(x):
    return "x" * (1 << 25)
--- return_a_huge_number
def solve(x):
    return 1 << (1 << 24)
--- return_itself
def solve(x):
    a = []
    a.append(a)
    return a
--- return_without_end
import itertools
def solve(x):
    return itertools.count()
--- be_a_class
class solve:
    def __init__(self, x): pass
    def __eq__(self, other): return True
--- be_nothing
solve = 1
--- not_be_there
def solved(x): return 1
--- not_be_python
def solve(x) return 1
--- sleep
import time
def solve(x): time.sleep(60)
--- not_end
import signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def solve(x):
    while True:
        try:
            while True: pass
        except BaseException:
            pass
"""
