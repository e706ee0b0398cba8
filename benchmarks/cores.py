"""CPU time of the processes that a benchmark started, by role, and of the whole machine."""

from collections.abc import Mapping

import psutil


def cpu_s(roles: Mapping[str, str]) -> dict[str, float]:
    """Return the CPU time so far of this process's descendants, by role.

    Args:
        roles: part of a process's name -> its role; the first match counts, and the rest is `others`.
    """
    out = dict.fromkeys([*roles.values(), "others"], 0.0)
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline()[:1]) or process.name()
            taken = process.cpu_times()
        except psutil.Error:  # the process has just ended
            continue
        role = next((role for part, role in roles.items() if part in name), "others")
        out[role] += taken.user + taken.system
    return out


def busy_s() -> float:
    """Return the CPU time so far of all programs on this machine, and the time that the host took from it."""
    taken = psutil.cpu_times()
    return float(taken.user + taken.nice + taken.system + taken.irq + taken.softirq + taken.steal)
