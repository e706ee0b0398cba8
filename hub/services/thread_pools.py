"""Thread pools of a gateway: one for each kind of call, each used in turns by tenant.

In a common pool images would wait for a slow store, and the store for slow sources.
"""

import os
from concurrent.futures import ThreadPoolExecutor

from ..admission.quotas import FITS, PARSED_AT_ONCE, SOURCE_DOWNLOADS, STORE_CALLS, UNPACKED_AT_ONCE
from ..concurrency import ActiveTenants, TenantThreads, lower_priority
from .decoding.processes import DecodeProcesses
from .trainings.instant import start_fit_thread

PARSE_THREADS = 2  # parsing holds Python's interpreter lock, so more threads would parse no faster
SOURCE_THREADS = 16  # downloads of adapter files, which may take minutes each
UNPACK_THREADS = 2  # entries of zips, which may inflate a thousand times
FIT_THREADS = 2  # classifiers of datasets
SPARE_DECODERS = 3  # per decoding thread; a spare one starts only in place of a decoder that takes too long


class ThreadPools:
    """The pools.

    Attributes:
        cores: of the machine.
        threads: images decoded, and calls to the store, at the same time.
        spare_decoders: further threads of each of the pools that decode.
        decoders, slow_decoders: decode images; `ImageDecoder` has the turns. The second has a low priority.
        processes: decode large images for the second of these.
        store: calls to the store and to files.
        parse: parses large bodies, and other work that holds Python's interpreter lock.
        unpack: entries of zips, at low priority.
        sources: downloads of adapter files by reference.
        fits: classifiers of datasets, at low priority.
    """

    def __init__(self, active: ActiveTenants) -> None:
        """
        Args:
            active: active tenants of the gateway.
        """
        self.cores = os.cpu_count() or 1
        self.threads = max(4, self.cores)
        self.spare_decoders = self.threads * SPARE_DECODERS
        decoders = self.threads + self.spare_decoders
        self.decoders = ThreadPoolExecutor(decoders, "decode")
        self.slow_decoders = ThreadPoolExecutor(decoders, "decode-slow", initializer=lower_priority)
        self.processes = DecodeProcesses()
        store = ThreadPoolExecutor(self.threads, "store")
        parse = ThreadPoolExecutor(PARSE_THREADS, "parse")
        sources = ThreadPoolExecutor(SOURCE_THREADS, "source")
        unpack = ThreadPoolExecutor(UNPACK_THREADS, "unpack", initializer=lower_priority)
        fits = ThreadPoolExecutor(FIT_THREADS, "fit", initializer=start_fit_thread)
        self.store = TenantThreads(store, self.threads, STORE_CALLS)
        self.parse = TenantThreads(parse, PARSE_THREADS, PARSED_AT_ONCE, active)
        self.unpack = TenantThreads(unpack, UNPACK_THREADS, UNPACKED_AT_ONCE, active)
        self.sources = TenantThreads(sources, SOURCE_THREADS, SOURCE_DOWNLOADS)
        self.fits = TenantThreads(fits, FIT_THREADS, FITS)
        self._executors = (self.decoders, self.slow_decoders, store, parse, unpack, sources, fits)

    def close(self) -> None:
        """Let idle threads end. A running call keeps its thread until it returns."""
        for executor in self._executors:
            executor.shutdown(wait=False)
        self.processes.close()
