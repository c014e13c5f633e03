"""What happens instead of an abort when JAX's coordination client loses its service.

When process 0 dies, the client of every other process, a C++ thread, ends its process at once: by default with a fatal
log message, or, if it was given a Python callback, by ``std::bad_cast``, because the callback's argument has no Python
form (jaxlib 0.10.2; a later one may simply call it). The second way leads through ``std::terminate``, whose handler can
be ours.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

_BAD_CAST = b"St8bad_cast"
_kept: list[object] = []  # C holds pointers to these


def call_instead_of_abort(function: Callable[[], None]) -> None:
    """Calls ``function``, which must not return, when a callback with an argument of no Python form is to be called.

    Any other reason to terminate is treated as before. Without libstdc++ (macOS), nothing changes: the process aborts.
    """
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, exception_type = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (OSError, AttributeError):
        return
    handler_type = ctypes.CFUNCTYPE(None)
    set_terminate.argtypes, set_terminate.restype = [handler_type], ctypes.c_void_p
    exception_type.argtypes, exception_type.restype = [], ctypes.c_void_p
    before = None

    def handle() -> None:
        found = exception_type()  # a std::type_info: its second word points to the name
        if found:
            name = ctypes.c_void_p.from_address(found + ctypes.sizeof(ctypes.c_void_p)).value
            if name and ctypes.string_at(name) == _BAD_CAST:
                function()
        if before:
            handler_type(before)()

    handler = handler_type(handle)
    _kept.append(handler)
    before = set_terminate(handler)
