"""A network of the tests' own, in which every IP address leads back to the machine and nothing else can be reached."""

import ctypes
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor

CLONE_NEWNET = 0x40000000
# All addresses, not just 127.0.0.1 and ::1, are this machine's.
COMMANDS = ("link set lo up", "route add local default dev lo", "-6 route add local default dev lo")


def thread_in_own_network() -> ThreadPoolExecutor:
    """Return an executor of one thread in a network namespace of its own.

    What runs in it, and the threads and processes started from there, see nothing of the machine's network, and the
    machine sees nothing of theirs. The namespace is gone when they have ended.

    Raises:
        OSError: the machine does not allow it, or lacks the command `ip`.
        subprocess.CalledProcessError: `ip` failed, for example because IPv6 is switched off.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="own-network")
    try:
        executor.submit(_enter_own_network).result()
    except BaseException:
        executor.shutdown()
        raise
    return executor


def _enter_own_network() -> None:
    # Namespaces belong to threads, so the rest of the process stays where it is. Python has this only from 3.12 on.
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    for command in COMMANDS:
        subprocess.run(["ip", *command.split()], check=True, capture_output=True)
