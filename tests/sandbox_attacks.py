"""Programs that try to get out of the sandbox. Each can be seen from outside, or says "out" if it got what it wanted.

``attack(place)`` gets a dict that names what the test has laid out: ``folder``, a directory that anybody may write
to, in it the file ``canary``; ``secret``, a file that says "out"; ``port`` and ``name``, where a TCP, a UDP and an
abstract Unix socket listen; ``pid``, a process.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import textwrap

PRELUDE = """
import ctypes, os, signal, socket, struct, subprocess, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    return libc.syscall(ctypes.c_long(number), *arguments)
"""


@dataclasses.dataclass(frozen=True)
class Attack:
    name: str
    code: str
    root: bool = False  # takes effect without the defence only for root


def programs() -> list[Attack]:
    """All of them that make sense on this processor."""
    x86 = platform.machine() == "x86_64"
    found = []
    for block in (FILES + NETWORK + PROCESSES + SIGNALS + RIGHTS + RESOURCES + (X86 if x86 else "")).split("\n--- ")[
        1:
    ]:
        head, _, body = block.partition("\n")
        name, *marks = head.split()
        body = textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")
        found.append(Attack(name, f"{PRELUDE}\ndef attack(place):\n{body}\n", "root" in marks))
    return found


FILES = """
--- read_a_file
return open(place["secret"]).read()
--- read_a_file_by_descriptor
fd = os.open(place["secret"], os.O_RDONLY)
return os.read(fd, 100).decode()
--- read_a_file_by_the_c_library
fd = libc.open(place["secret"].encode(), 0)
buffer = ctypes.create_string_buffer(100)
libc.read(fd, buffer, 100)
return buffer.value.decode()
--- read_a_file_through_a_mapping
import mmap
with open(place["secret"], "rb") as file:
    return mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)[:].decode()
--- read_a_file_as_module_source
import linecache
return linecache.getline(place["secret"], 1).strip()
--- read_a_file_beside_a_folder
folder = os.open(place["folder"], os.O_RDONLY | os.O_DIRECTORY)
fd = os.open("../" + os.path.basename(place["secret"]), os.O_RDONLY, dir_fd=folder)
return os.read(fd, 100).decode()
--- read_a_file_that_a_link_of_proc_leads_to
return open("/proc/self/root" + place["secret"]).read()
--- read_passwd
return "out" if "root:" in open("/etc/passwd").read() else ""
--- list_a_folder
return "out" if "canary" in os.listdir(place["folder"]) else ""
--- read_packages_of_others
import pathlib, sysconfig
packages = pathlib.Path(sysconfig.get_path("purelib"))
return "out" if any(path.open("rb") for path in packages.rglob("*.py")) else ""
--- write_a_file
open(place["folder"] + "/new", "w").write("x")
--- append_to_a_file
open(place["folder"] + "/canary", "a").write("x")
--- write_to_a_file_without_closing_it
os.write(os.open(place["folder"] + "/new", os.O_WRONLY | os.O_CREAT), b"x")
--- open_to_truncate
os.open(place["folder"] + "/canary", os.O_RDONLY | os.O_TRUNC)
--- create_without_a_name
os.write(os.open(place["folder"], os.O_TMPFILE | os.O_RDWR), b"x")
return "out"
--- truncate_a_file
os.truncate(place["folder"] + "/canary", 0)
--- delete_a_file
os.remove(place["folder"] + "/canary")
--- rename_a_file
os.rename(place["folder"] + "/canary", place["folder"] + "/gone")
--- link_a_file
os.link(place["folder"] + "/canary", place["folder"] + "/linked")
--- link_by_name
os.symlink("/etc/passwd", place["folder"] + "/linked")
--- make_a_folder
os.mkdir(place["folder"] + "/sub")
--- make_a_pipe_with_a_name
os.mkfifo(place["folder"] + "/pipe")
--- make_a_device root
os.mknod(place["folder"] + "/null", 0o600 | 0o020000, os.makedev(1, 3))
--- change_a_mode
os.chmod(place["folder"] + "/canary", 0o777)
--- change_an_owner root
os.chown(place["folder"] + "/canary", 12345, 12345)
--- change_a_time
os.utime(place["folder"] + "/canary", (1, 1))
--- write_with_a_database
import dbm.dumb
with dbm.dumb.open(place["folder"] + "/base", "c") as base:
    base[b"a"] = b"b"
--- write_a_temporary_file
import tempfile
tempfile.NamedTemporaryFile(dir=place["folder"], delete=False).write(b"x")
--- write_shared_memory
open(place["shared"], "w").write("x")
--- write_byte_code
import py_compile, sysconfig
py_compile.compile(sysconfig.get_path("stdlib") + "/this.py", cfile=place["folder"] + "/this.pyc")
--- copy_a_file
import shutil
shutil.copy(place["folder"] + "/canary", place["folder"] + "/copy")
--- open_by_the_newest_call
how = struct.pack("=QQQ", os.O_WRONLY | os.O_CREAT, 0o600, 0)
return "out" if call(437, -100, (place["folder"] + "/new").encode(), how, 24) >= 0 else ""
--- change_the_folder
os.chdir(place["folder"])
return "out"
"""

NETWORK = """
--- connect
socket.create_connection(("127.0.0.1", place["port"]), 5).send(b"x")
--- send_a_datagram
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", place["port"]))
--- connect_by_the_c_library
fd = libc.socket(2, 1, 0)
address = struct.pack("=HH4s8x", 2, socket.htons(place["port"]), socket.inet_aton("127.0.0.1"))
libc.connect(fd, address, 16)
--- connect_to_an_abstract_name
client = socket.socket(socket.AF_UNIX)
client.connect("\\0" + place["name"])
--- fetch_a_page
import urllib.request
urllib.request.urlopen(f"http://127.0.0.1:{place['port']}/", timeout=0.2).read()
--- connect_in_an_event_loop
import asyncio
asyncio.run(asyncio.open_connection("127.0.0.1", place["port"]))
--- listen
server = socket.create_server(("127.0.0.1", 0))
return "out"
--- listen_on_a_name
server = socket.socket(socket.AF_UNIX)
server.bind(place["folder"] + "/socket")
--- speak_to_the_kernel
socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
return "out"
--- make_a_pair_of_sockets
socket.socketpair()
return "out"
"""

PROCESSES = """
--- fork
if os.fork() == 0:
    open(place["folder"] + "/child", "w")
    os._exit(0)
time.sleep(0.1)
--- fork_many
for i in range(20):
    if os.fork() == 0:
        open(place["folder"] + f"/child{i}", "w")
        os._exit(0)
time.sleep(0.1)
--- fork_one_that_stays
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(0.3)
        open(place["folder"] + "/late", "w")
    os._exit(0)
--- fork_in_a_terminal
import pty
if pty.fork()[0] == 0:
    open(place["folder"] + "/child", "w")
    os._exit(0)
time.sleep(0.1)
--- run_a_program
subprocess.run(["touch", place["folder"] + "/touched"], env={"PATH": "/usr/bin:/bin"})
--- run_a_shell
os.system("/usr/bin/touch " + place["folder"] + "/touched")
--- spawn
os.waitpid(os.posix_spawn("/usr/bin/touch", ["touch", place["folder"] + "/touched"], {}), 0)
--- become_a_program
os.execv("/usr/bin/touch", ["touch", place["folder"] + "/touched"])
--- become_a_program_without_a_name
fd = os.memfd_create("x")
os.write(fd, open("/usr/bin/touch", "rb").read())
os.execve(fd, ["touch", place["folder"] + "/touched"], {})
--- start_a_thread
import threading
found = []
thread = threading.Thread(target=found.append, args=("out",))
thread.start()
thread.join()
return found[0]
--- start_a_worker_process
import multiprocessing
process = multiprocessing.get_context("fork").Process(target=open, args=(place["folder"] + "/child", "w"))
process.start()
process.join()
--- clone_by_number
pid = call(435, struct.pack("=8Q", 0, 0, 0, 0, 17, 0, 0, 0), 64)
if pid == 0:
    os.open(place["folder"] + "/child", os.O_CREAT | os.O_WRONLY)
    os._exit(0)
time.sleep(0.1)
"""

SIGNALS = """
--- signal_a_process
os.kill(place["pid"], signal.SIGUSR1)
time.sleep(0.1)
--- signal_a_group
os.killpg(place["pid"], signal.SIGUSR1)
time.sleep(0.1)
--- signal_by_descriptor
signal.pidfd_send_signal(os.pidfd_open(place["pid"]), signal.SIGUSR1)
time.sleep(0.1)
--- signal_a_thread
libc.tgkill(place["pid"], place["pid"], int(signal.SIGUSR1))
time.sleep(0.1)
--- look_for_the_parent
os.kill(os.getppid(), 0)
return "out"
--- trace_a_process
return "out" if libc.ptrace(0x4206, place["pid"], None, None) == 0 else ""
--- read_the_command_of_a_process
return "out" if b"marker" in open(f"/proc/{place['pid']}/cmdline", "rb").read() else ""
--- read_the_memory_of_the_parent
open(f"/proc/{os.getppid()}/mem", "rb", 0)
return "out"
--- read_the_environment_of_the_parent
open(f"/proc/{os.getppid()}/environ", "rb").read()
return "out"
--- copy_the_memory_of_the_parent
there = ctypes.addressof(ctypes.c_char_p.in_dll(libc, "environ"))
here = ctypes.create_string_buffer(8)
local, remote = (struct.pack("=QQ", a, 8) for a in (ctypes.addressof(here), there))
return "out" if libc.process_vm_readv(os.getppid(), local, 1, remote, 1, 0) == 8 else ""
--- limit_another_process
import resource
resource.prlimit(place["pid"], resource.RLIMIT_NOFILE, (77, 77))
return "out"
--- slow_another_process
os.setpriority(os.PRIO_PROCESS, place["pid"], 5)
return "out"
--- move_another_process
os.sched_setaffinity(place["pid"], os.sched_getaffinity(0))
return "out"
--- write_its_own_memory
with open("/proc/self/mem", "r+b", 0) as memory:
    return "out"
--- list_processes
return "out" if str(place["pid"]) in os.listdir("/proc") else ""
"""

RIGHTS = """
--- make_a_user_namespace
return "out" if libc.unshare(0x10000000) == 0 else ""
--- make_a_mount_namespace root
return "out" if libc.unshare(0x00020000) == 0 else ""
--- mount root
libc.unshare(0x00020000)
libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None)
return "out" if libc.mount(b"none", place["folder"].encode(), b"tmpfs", 0, None) == 0 else ""
--- change_the_root root
os.chroot(place["folder"])
return "out"
--- become_root root
os.setresuid(0, 0, 0)
return "out"
--- get_more_rights root
os.setgroups([0])
return "out"
--- lift_a_limit
import resource
resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
return "out"
--- name_the_process
return "out" if libc.prctl(15, b"innocent", 0, 0, 0) == 0 else ""
--- have_no_filter
return "out" if "Seccomp:\\t0" in open("/proc/self/status").read() else ""
--- change_the_personality
return "out" if libc.personality(0x0040000) >= 0 else ""
--- submit_to_a_ring
return "out" if call(425, 2, (ctypes.c_char * 120)()) >= 0 else ""
--- make_nameless_memory_file
os.memfd_create("x")
return "out"
--- share_memory
number = libc.shmget(0, 4096, 0o1600)
libc.shmctl(number, 0, None)
return "out" if number >= 0 else ""
--- see_what_was_handed_down
found = []
for fd in range(256):
    try:
        os.fstat(fd)
    except OSError:
        continue
    found.append(fd)
return "out" if len(found) > 4 else ""
--- see_the_environment
return "out" if dict(os.environ) else ""
--- write_to_what_was_handed_down
for fd in range(4, 256):
    try:
        os.fstat(fd)
    except OSError:
        continue
    return "out"
"""

RESOURCES = """
--- take_memory
block = bytearray(1 << 30)
return "out"
--- take_memory_in_pieces
blocks = [bytes(1 << 20) for _ in range(700)]
return "out"
--- map_memory
import mmap
block = mmap.mmap(-1, 1 << 30)
return "out"
--- lock_memory
return "out" if libc.mlock(ctypes.create_string_buffer(1 << 16), 1 << 16) == 0 else ""
--- open_many
for _ in range(200):
    os.dup(0)
return "out"
--- dump_core
import resource
return "out" if resource.getrlimit(resource.RLIMIT_CORE)[1] != 0 else ""
--- have_no_limit_of_time
import resource
return "out" if resource.getrlimit(resource.RLIMIT_CPU)[1] == resource.RLIM_INFINITY else ""
"""

X86 = """
--- run_bytes
import mmap
code = mmap.mmap(-1, 4096, prot=7)
code.write(b"\\xb8\\x2a\\x00\\x00\\x00\\xc3")
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
return "out" if ctypes.CFUNCTYPE(ctypes.c_int)(address)() == 42 else ""
--- make_memory_run
import mmap
code = mmap.mmap(-1, 4096)
code.write(b"\\xb8\\x2a\\x00\\x00\\x00\\xc3")
address = ctypes.addressof(ctypes.c_char.from_buffer(code))
libc.mprotect(ctypes.c_void_p(address), 4096, 5)
return "out" if ctypes.CFUNCTYPE(ctypes.c_int)(address)() == 42 else ""
--- fork_by_number
if call(57) == 0:
    os.open(place["folder"] + "/child", os.O_CREAT | os.O_WRONLY)
    os._exit(0)
time.sleep(0.1)
--- open_by_the_oldest_call
return "out" if call(85, (place["folder"] + "/new").encode(), 0o600) >= 0 else ""
--- socket_by_number
return "out" if call(41, 2, 1, 0) >= 0 else ""
--- add_a_key
return "out" if call(248, b"user", b"name", b"text", 4, -2) >= 0 else ""
--- handle_faults root
return "out" if call(323, 0) >= 0 else ""
--- load_a_map root
return "out" if call(321, 0, struct.pack("=IIII", 2, 4, 4, 1) + bytes(56), 72) >= 0 else ""
"""


def root() -> bool:
    return os.geteuid() == 0
