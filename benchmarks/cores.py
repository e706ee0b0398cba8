"""Whose processor time it was: the processes that a benchmark started, by what they are."""

from collections.abc import Mapping

import psutil


def cpu_s(roles: Mapping[str, str]) -> dict[str, float]:
    """CPU time so far of this process's children and theirs, by role.

    Args:
        roles: part of a process's name -> its role, the first that fits; all the rest is `others`.
    """
    out = dict.fromkeys([*roles.values(), "others"], 0.0)
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline()[:1]) or process.name()
            taken = process.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        role = next((role for part, role in roles.items() if part in name), "others")
        out[role] += taken.user + taken.system
    return out
