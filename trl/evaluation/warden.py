"""The process that runs what cannot be trusted: it starts a child for each, and ends it.

A script of its own, with Python's library alone: `cells.py` starts it and talks to it by its file
descriptor 0, a socket. There are four generations:

    launcher    gives up what it can see: other processes, the network, files
    warden      the first process of that world; has the libraries of the programs loaded
    keeper      one for each cell; when it ends the child, all that came of it ends too
    child       runs a program of `programs.py`, with limits and without rights

If who started the warden ends, the socket does, and with it everything here.
"""

import contextlib
import ctypes
import fcntl
import importlib
import json
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time

if __name__ == "__main__":  # where trl, and torch with it, cannot be imported
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    programs = importlib.import_module("programs")
else:
    from trl.evaluation import programs

NEW_MOUNTS, NEW_IPC, NEW_USERS = 0x00020000, 0x08000000, 0x10000000
NEW_PROCESSES, NEW_NETWORK = 0x20000000, 0x40000000
RECURSIVE, PRIVATE, BIND, NO_SETUID, NO_DEVICES = 0x4000, 0x40000, 0x1000, 0x2, 0x4
READ_ONLY, AT_RECURSIVE, MOUNT_SETATTR = 0x1, 0x8000, 442
DIE_WITH_PARENT, DUMPABLE, SUBREAPER, NO_NEW_RIGHTS = 1, 4, 36, 38
CAPABILITIES = 0x20080522

ROOT = "/proc"
"""Where the new root is put together: a folder that is always there, and that no program needs."""
GRACE = 0.05
"""Seconds in which a child may still end by itself once nothing more is asked of it."""
LONGEST_HUNT = 1.0
"""Seconds for what has escaped from a child, where it could."""
NOBODY = 65534
FOLDER = "/cell"
"""A child's home, of its own and in memory, where there is a root of one's own."""

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Call a function of the C library.

    Raises:
        OSError: if it fails, or there is none.
    """
    given = [each.encode() if isinstance(each, str) else each for each in arguments]
    function = getattr(libc, name, None)
    if function is None or function(*given):
        raise OSError(ctypes.get_errno(), name)


def mount(source, target, kind=None, flags=0, data=None):
    """Mount a file system, or show a place at another."""
    call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def unshare(own_user):
    """Have no part in the processes, network and mounts of the system from the next child on."""
    user, group = os.getuid(), os.getgid()
    rooms = NEW_PROCESSES | NEW_NETWORK | NEW_MOUNTS | NEW_IPC
    call("unshare", rooms | (NEW_USERS if own_user else 0))
    maps = {"setgroups": "deny", "uid_map": f"{user} {user} 1", "gid_map": f"{group} {group} 1"}
    for name, text in maps.items() if own_user else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def enter_root(places):
    """Make a root of nothing but some places, none of which can be written, and go there."""
    mount(None, "/", None, RECURSIVE | PRIVATE)
    mount("tmpfs", ROOT, "tmpfs", NO_SETUID, "mode=755,size=1m")
    os.makedirs(ROOT + FOLDER)
    for place in places:
        inside = ROOT + place
        os.makedirs(inside if os.path.isdir(place) else os.path.dirname(inside), exist_ok=True)
        if not os.path.isdir(place):
            open(inside, "w").close()
        mount(place, inside, None, BIND | RECURSIVE)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SETUID)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    call("syscall", MOUNT_SETATTR, -100, ROOT, AT_RECURSIVE, attributes, size)
    os.chroot(ROOT)
    os.chdir("/")


def free_user():
    """Return the number of a user whom nobody is; None: this process cannot become another."""
    if os.geteuid():
        return None
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    mine = 2**30 + os.getpid()  # its own: the number of processes is counted by user
    for user in (mine, NOBODY):
        if any(first <= user < first + count for first, _, count in ranges):
            return user
    return None


# -- the child -----------------------------------------------------------------------------------


def limit(megabytes, processes):
    """Set limits for this process and what comes of it; what a system does not know is left."""
    most = {"AS": megabytes << 20, "FSIZE": 16 << 20, "NOFILE": 64, "CORE": 0, "NPROC": processes}
    for name, value in most.items():
        with contextlib.suppress(AttributeError, OSError, TypeError, ValueError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def drop_rights(user):
    """Become a user whom nobody else is, if root, and lose for good what root may do."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    with contextlib.suppress(OSError):  # not Linux
        call("capset", (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)())
    with contextlib.suppress(OSError):
        call("prctl", NO_NEW_RIGHTS, 1, 0, 0, 0)


def be_child(handles, folder, settings):
    """Run a program, which has no more than its handles: 3, and 4 if there are two."""
    os.setsid()
    high = [fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in handles]
    for place, handle in enumerate(high, 3):
        os.dup2(handle, place)
    os.closerange(3 + len(handles), 2**16)
    os.chdir(folder)
    limit(settings["megabytes"], settings["processes"])
    drop_rights(settings["user"])
    os.environ.clear()
    os.environ.update(HOME=folder, TMPDIR=folder, PATH="/usr/bin:/bin", LANG="C.UTF-8")
    tempfile.tempdir = None
    return programs.run()


# -- those above it ------------------------------------------------------------------------------


def keep(control, handles, settings):
    """Start a child, wait until it is to end, and tell how it ended."""
    folder = FOLDER
    if settings["isolated"]:
        call("unshare", NEW_PROCESSES | NEW_MOUNTS | NEW_IPC)
        flags = NO_SETUID | NO_DEVICES
        mount("tmpfs", folder, "tmpfs", flags, "mode=1777,size=32m,nr_inodes=1000")
    else:
        with contextlib.suppress(OSError):
            call("prctl", SUBREAPER, 1, 0, 0, 0)
        folder = tempfile.mkdtemp(prefix="trl-cell-")
        os.chmod(folder, 0o777)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = be_child(handles, folder, settings)
        finally:
            os._exit(code)
    for handle in handles:
        os.close(handle)
    control.recv(1)
    status = reap(child)
    if not settings["isolated"]:
        shutil.rmtree(folder, ignore_errors=True)
    control.send(b"bad" if status else b"end")


def reap(child):
    """End the child and all that came of it; return 0 if it had ended well by itself."""
    until, ended, status = time.monotonic() + GRACE, 0, 0
    while not ended and time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0 if ended else 0.001)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    # Where it had no world of its own, its orphans are children of this process now.
    until = time.monotonic() + LONGEST_HUNT
    with contextlib.suppress(ChildProcessError, OSError):
        while time.monotonic() < until:
            with open(f"/proc/self/task/{os.getpid()}/children") as file:
                for each in file.read().split():
                    os.kill(int(each), signal.SIGKILL)
            os.waitpid(-1, os.WNOHANG)
    return status


def guard(control, settings):
    """Be the warden: load libraries, say that all is ready, and start a keeper for each cell."""
    with contextlib.suppress(OSError):
        call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        call("prctl", DUMPABLE, 0, 0, 0, 0)  # no child may look into its parents
    told = {"isolated": settings["isolated"], "counted": bool(settings["processes"])}
    try:
        if settings["isolated"]:
            enter_root(settings["places"])
    except OSError:
        told["again"] = True
    try:
        sys.path[:] = settings["paths"]
        programs.load(settings["modules"])
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
    control.sendall(json.dumps(told).encode() + b"\n")
    while not told.keys() & {"again", "error"}:
        sign, handles, _, _ = socket.recv_fds(control, 1, 2)
        if not sign:
            return
        keeper = os.fork()
        if keeper == 0:
            keep(control, handles, settings)
            return
        for handle in handles:
            os.close(handle)
        if os.waitpid(keeper, 0)[1]:
            return


def launch(settings):
    """Leave the world of the system, if it can be done and is to be; start the warden."""
    control = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)  # /dev/null
    user = None
    with contextlib.suppress(OSError):
        user = free_user()
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # if memory runs out, these processes end first
    for own_user in [user is None, True][: 2 * settings["isolated"]]:
        try:
            unshare(own_user)
            user = None if own_user else user
            break
        except OSError:
            continue
    else:
        settings["isolated"] = False
    if user is None and not (settings["isolated"] and os.geteuid()):
        settings["processes"] = None  # root has no limit; any other user one for all it runs
    settings["user"] = user
    warden = os.fork()
    if warden == 0:
        guard(control, settings)
        os._exit(0)
    control.close()
    return os.waitpid(warden, 0)[1]


if __name__ == "__main__":
    os._exit(bool(launch(json.loads(sys.argv[1]))))
