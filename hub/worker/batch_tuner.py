"""How many images a forward pass should have, and how many threads: learned from the passes themselves.

A GPU wants many images; on a CPU a few large ones fill the cores, and more would only make all wait longer. A second
thread helps while a core is free, and hinders while a gateway has it. Neither is known when a worker starts, beside
everything else that starts with it, nor does it stay as it is.
"""

from collections.abc import Hashable, Mapping, Sequence

GAIN = 1.05  # how much faster, an image, a larger pass must be to be worth its size
TRY = 16  # passes until what is as good as the best is tried again; what is worse, later
FASTER, SLOWER = 0.5, 0.1  # what one pass changes of what is known: others' work only ever makes a pass slower
# Beside tenants who send little, who wait for all of a pass: so many times as long as the shortest it may take at most,
# and so much faster, an image, it must be.
PATIENCE, WORTH = 2.0, 1.5
SHOCK = 1.5  # no pass counts as more times slower than is known: something else had the machine


class Pace:
    """Knows milliseconds an image by size of the pass (powers of two) and number of threads.

    Attributes:
        images: the smallest pass that is nearly as fast, an image, as any.
        next_images: the most that the next one should have: mostly that, now and then the size above or below, to see
            whether things have changed.
    """

    def __init__(self, most: int, threads: Sequence[int]) -> None:
        """
        Args:
            most: images of the largest pass.
            threads: the numbers to choose from.
        """
        self.sizes = [*(2**k for k in range(most.bit_length()) if 2**k < most), most]
        self.images = self.next_images = most
        self._threads = tuple(dict.fromkeys(threads))
        self._image_ms: dict[tuple[int, int], float] = {}
        self._rest: dict[Hashable, float] = {}

    def most(self, uneven: bool) -> int:
        """Images of the next pass at most.

        Args:
            uneven: whether some tenants send many more images than others at this time.
        """
        known = self._known()
        if not uneven or not known:
            return self.next_images
        shortest = min(known)
        most_ms, worth_ms = PATIENCE * shortest * known[shortest], known[shortest] / WORTH
        quick = [size for size, ms in known.items() if size * ms <= most_ms and ms <= worth_ms]
        return min(self.next_images, max(quick, default=shortest))

    def threads(self, images: int) -> int:
        """For a pass of so many images: the best number, now and then another."""
        size = self._size(images)
        known = {n: self._image_ms[size, n] for n in self._threads if (size, n) in self._image_ms}
        best = min(known, key=known.__getitem__, default=self._threads[0])
        for n in self._threads:
            if n != best and self._is_due((size, n), known[n] / known[best] if n in known else 0):
                return n
        return best

    def note(self, images: int, threads: int, ms: float) -> None:
        """A pass took so many milliseconds."""
        way = self._size(images), threads
        known = self._image_ms.get(way, ms / images)
        change = min(ms / images, SHOCK * known) - known
        self._image_ms[way] = known + change * (FASTER if change < 0 else SLOWER)
        fastest = self._known()
        self.images = self.next_images = _best(fastest)
        place = self.sizes.index(self.images)
        for size in self.sizes[max(0, place - 1) : place + 2]:
            if size != self.images and self._is_due(size, fastest.get(size, 0) / fastest[self.images]):
                self.next_images = size
                return

    def settled(self) -> bool:
        """Whether two sizes are known that are larger than the best, so that still larger ones need not be tried."""
        known = self._known()
        return sum(size > _best(known) for size in known) >= 2

    def __str__(self) -> str:
        return f"{self.images} of {self._known()} (ms an image)"

    def _known(self) -> dict[int, float]:
        """Milliseconds an image of each size that was tried, with the best number of threads; small sizes first."""
        known: dict[int, float] = {}
        # `sorted` copies before anything else runs: the thread of the passes notes while the batcher's loop asks.
        for (size, _), ms in sorted(self._image_ms.items()):
            known[size] = min(ms, known.get(size, ms))
        return known

    def _size(self, images: int) -> int:
        return next(size for size in self.sizes if size >= images)

    def _is_due(self, way: Hashable, ratio: float) -> bool:
        """Whether what took `ratio` times as long is tried again now; 0, not known, at once."""
        self._rest[way] = self._rest.get(way, TRY) - 1 if ratio else 0
        if self._rest[way] > 0:
            return False
        self._rest[way] = TRY * ratio**3
        return True


def _best(known: Mapping[int, float]) -> int:
    return next(size for size, ms in known.items() if ms <= GAIN * min(known.values()))
