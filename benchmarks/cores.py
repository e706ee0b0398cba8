"""CPU time of the processes that a benchmark started, by role, and of the whole machine."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import psutil


def cpu_s(roles: Mapping[str, str], above: int | None = None) -> dict[str, float]:
    """Return the CPU time so far of a process's descendants, by role.

    Args:
        roles: part of a process's name -> its role; the first match counts, and the rest is `others`.
        above: id of the process; None: this one.
    """
    out = dict.fromkeys([*roles.values(), "others"], 0.0)

    def role_of(process: psutil.Process) -> str:
        name = " ".join(process.cmdline()[:1]) or process.name()
        return next((role for part, role in roles.items() if part in name), "others")

    for role, taken_s in by_process(psutil.Process(above).children(recursive=True), role_of).values():
        out[role] += taken_s
    return out


def by_process(
    processes: Iterable[psutil.Process], role_of: Callable[[psutil.Process], str]
) -> dict[int, tuple[str, float]]:
    """Return role and CPU time so far of each process that lives, by its id."""
    out = {}
    for process in processes:
        try:
            taken = process.cpu_times()
            out[process.pid] = role_of(process), taken.user + taken.system
        except psutil.Error:  # the process has just ended
            continue
    return out


def used_s(before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]]) -> dict[str, float]:
    """Return the CPU time between two looks of `by_process`, by role, of the processes that live at the second one.

    What a process used that ended in between, such as the one that deploys a hub, is not known.
    """
    out: defaultdict[str, float] = defaultdict(float)
    for pid, (role, taken_s) in after.items():
        out[role] += taken_s - before.get(pid, (role, 0.0))[1]
    return dict(out)


def busy_s() -> float:
    """Return the CPU time so far of all programs on this machine, and the time that the host took from it."""
    taken = psutil.cpu_times()
    return float(taken.user + taken.nice + taken.system + taken.irq + taken.softirq + taken.steal)
