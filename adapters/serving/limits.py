"""The sizes that a bank accepts, without the bank."""

from dataclasses import dataclass

from ..backbone_info import BackboneInfo, Site
from ..format.errors import AdapterError, Problem, enough
from ..format.file import Adapter
from ..format.names import KRONECKER, NORM, TYPICALITY
from ..method import sizes

HEAD_TENSORS = 2  # weight and bias


@dataclass(frozen=True)
class BankLimits:
    """Sizes that a bank accepts; holds no weights, so that a process without a bank can check adapters."""

    backbone: BackboneInfo
    max_rank: int
    max_kernels: int
    factor: int

    @property
    def max_tensors(self) -> int:
        """Largest number of tensors of a file that fits: all tensors of every site and norm layer, head, typicality."""
        sites = sum(len(KRONECKER) + 2 * (site.rescale_out + site.rescale_in) for site in self.backbone.sites)
        return sites + len(NORM) * len(self.backbone.norms) + HEAD_TENSORS + len(TYPICALITY)

    def check(self, adapter: Adapter) -> None:
        """Check that an adapter fits the bank.

        Raises:
            AdapterError: the adapter has another backbone or factor, too many kernels, or too large a rank.
        """
        adapter.check(self.backbone)
        sites = {site.name: site for site in self.backbone.sites}
        problems: list[Problem] = []
        for name, parts in adapter.layer_shapes.items():
            if "karst_c" not in parts:
                continue
            if enough(problems):
                break
            kernels, *sides = parts["karst_c"]
            rank = parts["karst_a"][3]
            _, *wanted = self.shapes(sites[name])[0]
            if kernels > self.max_kernels:
                problems.append(
                    Problem(
                        f"{name}.karst_c",
                        f"has {kernels} kernels, but at most {self.max_kernels} fit; train with fewer kernels",
                    )
                )
            if rank > self.max_rank:
                problems.append(
                    Problem(
                        f"{name}.karst_a",
                        f"has rank {rank}, but at most {self.max_rank} fits; train with a smaller rank",
                    )
                )
            if sides != wanted:
                found, expected = (" x ".join(map(str, pair)) for pair in (sides, wanted))
                problems.append(
                    Problem(
                        f"{name}.karst_c",
                        f"has sides {found}, expected {expected}; train with factor {self.factor}",
                    )
                )
        if problems:
            raise AdapterError(problems)

    def shapes(self, site: Site) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of the largest C, A and B that fit a site."""
        return sizes.shapes(
            site.d_in, site.d_out, site.splits, kernels=self.max_kernels, rank=self.max_rank, factor=self.factor
        )
