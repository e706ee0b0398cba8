"""What shape an adapter has: kernels, rank, factor, gain, re-scaling, norms; and the paper's presets."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigError(ValueError):
    """A config or recipe that makes sense by itself and not with this backbone or these devices."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Place = TypeVar("Place", bound=_Named)
Rescale = Literal["channel", "scalar", "none"]


class KarstConfig(BaseModel):
    """The hyper-parameters of one KARST adapter (KARST.md, "The method")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernels: int = Field(2, ge=1, le=256, description="N, how many Kronecker products are summed in a layer")
    rank: int = Field(8, ge=1, le=1024, description="r, the inner dimension of A_i B_i")
    factor: int = Field(8, ge=1, le=1024, description="p = q, the side of C_i where it divides the layer's sides")
    gain: float | None = Field(None, gt=0, allow_inf_nan=False, description="g, fixed; None means 1 / rank")
    rescale: Rescale = Field("channel", description="one scale and shift per channel, per layer, or none")
    norms: bool = Field(False, description="tune the weights and biases of the norm layers, too")
    stage_ranks: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="rank of each stage of a backbone with stages (Swin), the largest `rank`; None: `rank` in all"
    )

    sites: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, description="patterns of the layers to adapt, such as `blocks.1[01].*`; None: every layer"
    )

    @model_validator(mode="after")
    def _stages_within_rank(self) -> "KarstConfig":
        if self.stage_ranks is not None and max(self.stage_ranks, default=0) != self.rank:
            raise ValueError(f"stage_ranks must have rank = {self.rank} as their largest, not {self.stage_ranks}")
        return self

    def chosen(self, places: Sequence[Place]) -> list[Place]:
        """Those of a backbone's sites (or norms) that `sites` names; the patterns are `fnmatch`'s."""
        if self.sites is None:
            return list(places)
        patterns = self.sites
        return [place for place in places if any(fnmatchcase(place.name, pattern) for pattern in patterns)]

    def rank_at(self, stage: int | None) -> int:
        """r of a layer in this stage of the backbone; None is a layer outside of stages.

        Raises:
            ConfigError: `stage_ranks` has no rank for it.
        """
        if self.stage_ranks is None:
            return self.rank
        if stage is None or stage >= len(self.stage_ranks):
            raise ConfigError(
                f"stage_ranks has {len(self.stage_ranks)} ranks, but the backbone has a layer "
                + ("outside of any stage" if stage is None else f"in stage {stage}, counted from 0")
            )
        return self.stage_ranks[stage]

    def gain_at(self, stage: int | None) -> float:
        """g of a layer in this stage: 1 / its own rank where no gain is given."""
        return self.gain if self.gain is not None else 1.0 / self.rank_at(stage)

    @property
    def effective_gain(self) -> float:
        """g as a number, the file's: the official code's default multiplier 1 and alpha 1 give 1 / rank."""
        return self.gain if self.gain is not None else 1.0 / self.rank


# The official scripts' sizes (KARST.md, "The paper's recipe"), with the paper's re-scaling, a vector per channel.
PRESETS = MappingProxyType(
    {
        "karst-vtab": KarstConfig(kernels=8),
        "karst-fewshot": KarstConfig(kernels=2, norms=True),
        "karst-swin": KarstConfig(kernels=2, stage_ranks=(2, 2, 4, 8)),
    }
)
