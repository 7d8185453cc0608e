"""Finds out whether a forked process can compute: a fork copies none of the threads that torch has started, and waits
for them all the same.
"""

from __future__ import annotations

import os
import threading
import time
import warnings

import torch

_FORKED = 0x40  # PF_FORKNOEXEC of the Linux kernel
_PARALLEL = 1 << 17  # elements that torch fills with several threads, if it has them
_IDLE_LOOKS = 10  # one after the other, 10 ms apart


def check_threads() -> None:
    """Raise ``RuntimeError`` if the first parallel operation of the calling thread would never return.

    That is so after a fork, in the thread that goes on, if it had used OpenMP before: its pool counts threads that are
    gone. No interface tells, so one operation is tried in a child process. In a process that was not forked, in other
    threads, and where the system does not tell (other than Linux), nothing is done.
    """
    if threading.current_thread() is not threading.main_thread() or not _is_forked():
        return
    if len(os.listdir("/proc/self/task")) > threading.active_count():
        return  # this process has a pool of its own, or other threads that cannot be told from one
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of forking beside other threads: the child runs no Python of theirs
        child = os.fork()
    if child == 0:
        try:
            torch.empty(_PARALLEL).fill_(0.0)
        finally:
            os._exit(0)
    if not _ends(child):
        raise RuntimeError(
            "this process was forked from one in which torch had started its threads; a fork does not copy them, and "
            "the engine would wait for "
            "them for ever: start processes by 'spawn', as multiprocessing.get_context('spawn') does, or fork before "
            "torch computes "
            "anything and make the engine after the fork"
        )


def _is_forked() -> bool:
    """Whether this process began by a fork without an exec."""
    try:
        fields = _status(os.getpid())
    except OSError:
        return False
    return bool(int(fields[6]) & _FORKED)


def _status(process: int) -> list[str]:
    """The fields of /proc/PID/stat, from the state on."""
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _ends(child: int) -> bool:
    """Wait for ``child``; False, and it is killed, if it sleeps without another thread that could wake it."""
    num_idle = 0
    while True:
        try:
            if os.waitpid(child, os.WNOHANG)[0]:
                return True
            is_alone = len(os.listdir(f"/proc/{child}/task")) == 1
            num_idle = num_idle + 1 if is_alone and _status(child)[0] == "S" else 0
        except OSError:  # somebody else waits for all children of this process
            return True
        if num_idle >= _IDLE_LOOKS:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)
