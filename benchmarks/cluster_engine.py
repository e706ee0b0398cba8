"""Discrete-event model of the hub: gateways, workers with slots and batches, autoscaling. It does not use Ray.

Times are seconds from the start. The model has these parts of the hub:
- the batcher's rules: a pass starts when the worker is idle, or after a short wait for as many images as the last batch
- the adapter cache: one load for all waiting calls, eviction of the least recently used without a lease, host memory
- routing (`cluster_routing`), and Serve's rules of autoscaling
The model lacks per-tenant fairness in the batcher, limits, refusals and retries. Every call has one image. A load
waits for a free slot and does not drain one.
"""

import heapq
import math
from collections import OrderedDict, deque

import numpy as np
from numpy.typing import NDArray

from .cluster_model import Callers, Result, Scaling, Times, Traffic, digests, in_line
from .cluster_routing import Router

TICK_S = 1.0  # of the autoscaler
DRAIN_S = 10.0  # in which the queue should be empty
MOST_WORKERS = 100_000
LOADED, DONE, TIMER, READY, TICK, ARRIVED = range(6)


class _Worker:
    def __init__(self, lanes: int) -> None:
        self.slots: OrderedDict[int, int] = OrderedDict()  # adapter -> leases, least recently used first
        self.host: OrderedDict[int, None] = OrderedDict()
        self.loading: dict[int, list[int]] = {}  # adapter -> waiting calls
        self.starved: deque[int] = deque()  # loaded, while every slot is in use
        self.lanes = [0.0] * lanes  # when each becomes free
        self.queue: deque[int] = deque()
        self.batch: list[int] = []
        self.threads = 0  # threads that still compute the batch
        self.last_size, self.since, self.timer = 1, -math.inf, False
        self.busy_s, self.passes, self.images = 0.0, 0, 0


class Cores:
    """Jobs that share cores (processor sharing). No job uses more than one core."""

    def __init__(self, cores: float) -> None:
        self._cores = cores
        self._jobs: list[tuple[float, int, tuple[int, int, int]]] = []  # ordered by the virtual time of their end
        self._virtual = self._now = 0.0
        self._count = 0

    def add(self, now: float, cpu_s: float, job: tuple[int, int, int]) -> None:
        self._advance(now)
        self._count += 1
        heapq.heappush(self._jobs, (self._virtual + cpu_s, self._count, job))

    def next_s(self) -> float:
        """Return the time at which the next job ends."""
        return self._now + (self._jobs[0][0] - self._virtual) / self._rate() if self._jobs else math.inf

    def pop(self) -> tuple[int, int, int]:
        self._advance(self.next_s())
        return heapq.heappop(self._jobs)[2]

    def _rate(self) -> float:
        return min(1.0, self._cores / len(self._jobs)) if self._jobs else 1.0

    def _advance(self, now: float) -> None:
        self._virtual += (now - self._now) * self._rate()
        self._now = now


class Cluster:
    """Workers and the calls in them, for one run."""

    def __init__(
        self,
        times: Times,
        workers: int,
        policy: str,
        numbers: NDArray[np.uint64],
        *,
        gateways: int = 0,
        told: bool = True,
        scaling: Scaling | None = None,
        seed: int = 0,
    ) -> None:
        """Create the cluster.

        Args:
            policy, numbers, gateways, told: as in `Router`, whose `digests` gives the numbers.
            seed: the same seed and traffic give the same result.
        """
        self.times = times
        self.router = Router(policy, numbers, gateways=gateways, seed=seed, batch=times.batch_size, told=told)
        self.workers: list[_Worker] = []
        self.history: list[tuple[float, int]] = []
        self._active: list[int] = []
        self._seeds = digests(MOST_WORKERS, seed + 1_000)
        self._scaling = scaling
        self._starting = 0
        self._recent: deque[tuple[float, int, int]] = deque()  # (second, waiting and running images, answers so far)
        self._answered = 0
        self._wants: tuple[float, bool] | None = None  # time since which the autoscaler wants more (True) or fewer
        self._events: list[tuple[float, int, int, int, int]] = []
        self._count = 0
        self._cores = Cores(times.cores) if times.cores else None
        self._active = list(range(workers))
        for _ in range(workers):
            self._add()
        self._changed(0.0)

    def fill(self, popular: NDArray[np.int64]) -> None:
        """Fill slots and host memory approximately as long traffic does.

        The most popular adapters go first: into slots of the worker that receives their calls, and into host memory of
        all their owners.
        """
        slots, host = self.times.slots, self.times.host_adapters
        if self.router.policy in ("random", "two choices"):  # all workers receive the same traffic
            own = [popular[: max(slots, host)].tolist()] * len(self.workers)
            first = own
        else:
            first, own = ([[] for _ in self.workers] for _ in range(2))
            self.router.know(popular)
            for adapter in popular.tolist():
                homes = self.router.homes(adapter)
                if len(first[homes[0]]) < slots:
                    first[homes[0]].append(adapter)
                for home in homes:
                    if len(own[home]) < host:
                        own[home].append(adapter)
        for worker, resident, held in zip(self.workers, first, own, strict=True):
            worker.slots = OrderedDict.fromkeys(reversed(resident[:slots]), 0)
            worker.host = OrderedDict.fromkeys(reversed(held[:host]))

    def run(self, traffic: Traffic | Callers, warm_up_s: float = 0.0) -> Result:
        """Run the traffic and return the result.

        Args:
            warm_up_s: calls that start earlier do not count.
        """
        self._begin(traffic, warm_up_s)
        events, cores, gateway_s = self._events, self._cores, self.times.gateway_s
        reach = self._reach
        following, calls = 0, len(reach)
        while True:
            arrives = reach[following] if following < calls else math.inf
            event = events[0][0] if events else math.inf
            ends = cores.next_s() if cores else math.inf
            if arrives <= event and arrives <= ends:
                if arrives == math.inf:
                    return self._result()
                if cores:
                    cores.add(arrives, gateway_s, (ARRIVED, 0, following))
                else:
                    self._arrive(arrives, following)
                following += 1
            elif event <= ends:
                now, _, kind, worker, what = heapq.heappop(events)
                self._handle(now, kind, worker, what)
            else:
                assert cores is not None
                self._handle(ends, *cores.pop())

    def _begin(self, traffic: Traffic | Callers, warm_up_s: float) -> None:
        self._warm_up_s = warm_up_s
        self._store_loads = self._host_loads = 0
        self._callers = traffic if isinstance(traffic, Callers) else None
        self._reach: list[float] = []
        self._sent: list[float] = []
        self._adapters: list[int] = []
        if isinstance(traffic, Traffic):
            self._sent, self._adapters = traffic.times.tolist(), traffic.adapters.tolist()
            waited = in_line(traffic.times, self.times.gateway_s, self.times.gateways)
            self._reach = self._sent if self._cores else waited.tolist()
            self._last_s = self._sent[-1]
        else:
            self._last_s = traffic.seconds
            for _ in range(traffic.count):
                self._push(0.0, ARRIVED, 0, -1)
        self._finished = [0.0] * len(self._sent)
        self._hits = bytearray(len(self._sent))
        self._gateway_of = [0] * len(self._sent)
        if self._scaling:
            self._push(TICK_S, TICK, 0, 0)

    def _handle(self, now: float, kind: int, worker: int, what: int) -> None:
        if kind == DONE:
            self._done(now, worker)
        elif kind == LOADED:
            self._loaded(now, worker, what)
        elif kind == TIMER:
            self.workers[worker].timer = False
            self._start(now, worker)
        elif kind == ARRIVED and what >= 0:
            self._arrive(now, what)
        elif kind == ARRIVED:
            self._send_next(now)
        elif kind == READY:
            self._starting -= 1
            self._active.append(self._add())
            self._changed(now)
        else:
            self._scale(now)

    def _push(self, at: float, kind: int, worker: int, what: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, kind, worker, what))

    def _send_next(self, now: float) -> None:
        """Send a caller's next call, in a closed loop."""
        assert self._callers is not None
        if now >= self._last_s:
            return
        call = len(self._sent)
        self._sent.append(now)
        self._adapters.append(self._callers.adapters[call % len(self._callers.adapters)])
        self._finished.append(0.0)
        self._hits.append(0)
        self._gateway_of.append(0)
        if self._cores:
            self._cores.add(now, self.times.gateway_s, (ARRIVED, 0, call))
        else:
            self._push(now + self.times.gateway_s, ARRIVED, 0, call)

    def _arrive(self, now: float, call: int) -> None:
        """Route a call to a worker."""
        adapter = self._adapters[call]
        index, self._gateway_of[call] = self.router.send(adapter, now, self.workers)
        worker = self.workers[index]
        if adapter in worker.slots:
            worker.slots[adapter] += 1
            worker.slots.move_to_end(adapter)
            self._hits[call] = 1
            self._enqueue(now, worker, [call])
            self._start(now, index)
        elif adapter in worker.loading:
            worker.loading[adapter].append(call)
        else:
            worker.loading[adapter] = [call]
            in_host = adapter in worker.host
            if self._sent[call] >= self._warm_up_s:
                self._host_loads += in_host
                self._store_loads += not in_host
            takes = self.times.host_load_s if in_host else self.times.store_load_s
            if self._cores:
                self._cores.add(now, takes, (LOADED, index, adapter))
            else:
                at = max(now, worker.lanes[0]) + takes
                heapq.heapreplace(worker.lanes, at)
                self._push(at, LOADED, index, adapter)

    def _loaded(self, now: float, index: int, adapter: int) -> None:
        worker, times = self.workers[index], self.times
        if len(worker.slots) >= times.slots:
            idle = next((held for held, leases in worker.slots.items() if not leases), None)
            if idle is None:
                worker.starved.append(adapter)
                return
            del worker.slots[idle]
            if idle in worker.host:
                worker.host.move_to_end(idle)  # in use until now
        calls = worker.loading.pop(adapter)
        worker.slots[adapter] = len(calls)
        if adapter in worker.host:
            worker.host.move_to_end(adapter)
        elif times.host_adapters:
            worker.host[adapter] = None
            if len(worker.host) > times.host_adapters:
                worker.host.popitem(last=False)
        self._enqueue(now, worker, calls)
        self._start(now, index)

    def _enqueue(self, now: float, worker: _Worker, calls: list[int]) -> None:
        if not worker.queue:
            if not worker.batch and now - worker.since > self.times.batch_wait_s:
                worker.last_size = 1  # idle
            worker.since = max(worker.since, now)
        worker.queue.extend(calls)

    def _start(self, now: float, index: int) -> None:
        """Start a pass if the batcher's rules allow it."""
        worker, times = self.workers[index], self.times
        waiting = len(worker.queue)
        if worker.batch or not waiting:
            return
        if waiting < min(worker.last_size, times.batch_size):
            due = worker.since + times.batch_wait_s
            if now < due:
                if not worker.timer:
                    worker.timer = True
                    self._push(due, TIMER, index, 0)
                return
        size = min(waiting, times.batch_size)
        worker.batch = [worker.queue.popleft() for _ in range(size)]
        worker.last_size = size
        takes = times.forward_s(size)
        worker.threads = times.threads if self._cores and takes >= times.threads_from_s else 1
        for _ in range(worker.threads):
            if self._cores:
                self._cores.add(now, takes / worker.threads, (DONE, index, 0))
            else:
                self._push(now + takes, DONE, index, 0)
        if now >= self._warm_up_s:
            worker.busy_s += takes
            worker.passes += 1
            worker.images += size

    def _done(self, now: float, index: int) -> None:
        worker, batch, wire_s = self.workers[index], self.workers[index].batch, self.times.wire_s
        worker.threads -= 1
        if worker.threads:
            return
        worker.batch = []
        self._answered += len(batch)
        worker.since = now
        for call in batch:
            self._finished[call] = now + wire_s
            worker.slots[self._adapters[call]] -= 1
            self.router.done(index, self._gateway_of[call], now)
            if self._callers:
                self._push(now + wire_s + self._callers.pause_s, ARRIVED, 0, -1)
        while worker.starved and not all(worker.slots.values()):
            self._loaded(now, index, worker.starved.popleft())
        self._start(now, index)

    def _add(self) -> int:
        self.workers.append(_Worker(self.times.loads_at_once))
        self.router.loads.append(0)
        return len(self.workers) - 1

    def _changed(self, now: float) -> None:
        self.router.join(self._active, self._seeds[self._active])
        self.history.append((now, len(self._active)))

    def _scale(self, now: float) -> None:
        """Apply Serve's rules once per second."""
        scaling, recent = self._scaling, self._recent
        assert scaling is not None
        recent.append((now, sum(self.router.loads), self._answered))
        while recent[0][0] < now - scaling.look_back_s:
            recent.popleft()
        images = sum(images for _, images, _ in recent) / len(recent)
        if scaling.signal == "passes":
            load = images / self.times.batch_size
        else:
            seconds = max(now - recent[0][0], TICK_S)
            per_s = (self._answered - recent[0][2]) / seconds + images / DRAIN_S
            load = per_s / self.times.most_per_s
        wanted = math.ceil(load / scaling.target)
        wanted = min(max(wanted, scaling.least), scaling.most)
        have = len(self._active) + self._starting
        if wanted == have:
            self._wants = None
        else:
            more = wanted > have
            if self._wants is None or self._wants[1] != more:
                self._wants = (now, more)
            if now - self._wants[0] >= (scaling.up_s if more else scaling.down_s):
                self._wants = None
                for _ in range(wanted - have):
                    self._starting += 1
                    self._push(now + self.times.start_s, READY, 0, 0)
                if not more and wanted < len(self._active):  # workers that stop finish their calls first
                    self._active = self._active[:wanted]
                    self._changed(now)
        if now < self._last_s:
            self._push(now + TICK_S, TICK, 0, 0)

    def _result(self) -> Result:
        sent, finished = np.array(self._sent), np.array(self._finished)
        counted = sent >= self._warm_up_s
        took = (finished - sent)[counted]
        seconds = max(float(finished.max()) - self._warm_up_s, 1e-9)
        images = np.array([worker.images for worker in self.workers], float)
        passes = sum(worker.passes for worker in self.workers)
        return Result(
            calls=len(took),
            hit_rate=float(np.frombuffer(self._hits, np.uint8)[counted].mean()),
            host_loads=self._host_loads,
            store_loads=self._store_loads,
            store_loads_per_s=self._store_loads / max(self._last_s - self._warm_up_s, 1e-9),
            mean_ms=1e3 * float(took.mean()),
            p50_ms=1e3 * float(np.quantile(took, 0.5)),
            p99_ms=1e3 * float(np.quantile(took, 0.99)),
            per_second=len(took) / seconds,
            imbalance=float(images.max() / images.mean()),
            utilisation=sum(worker.busy_s for worker in self.workers) / seconds / len(self.workers),
            images_a_pass=float(images.sum() / max(passes, 1)),
            spilled=self.router.spilled / len(sent),
            workers=self.history,
            sent_s=sent[counted],
            took_s=took,
        )
