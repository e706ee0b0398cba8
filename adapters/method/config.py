"""Hyper-parameters of an adapter (kernels, rank, factor, gain, re-scaling, norms), and the paper's presets."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Annotated, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ConfigError(ValueError):
    """A config or recipe that is valid alone, but not with this backbone or these devices."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Layer = TypeVar("Layer", bound=_Named)
Rescale = Literal["channel", "scalar", "none"]


class KarstConfig(BaseModel):
    """The hyper-parameters of one KARST adapter; docs/method.md has the formulas."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernels: int = Field(2, ge=0, le=256, description="N, number of Kronecker products summed in a layer")
    rank: int = Field(8, ge=1, le=1024, description="r, the inner dimension of A_i B_i")
    factor: int = Field(8, ge=1, le=1024, description="p = q, the side of C_i where it divides the layer's sides")
    gain: float | None = Field(None, gt=0, allow_inf_nan=False, description="g, fixed; None means 1 / rank")
    rescale: Rescale = Field("channel", description="one scale and shift per channel, per layer, or none")
    norms: bool = Field(False, description="tune the weights and biases of the norm layers")
    stage_ranks: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, description="rank of each stage of a backbone with stages (Swin), the largest `rank`; None: `rank` in all"
    )
    sites: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        None, description="patterns of the layers to adapt, such as `blocks.1[01].*`; None: every layer"
    )

    @model_validator(mode="after")
    def _stages_within_rank(self) -> "KarstConfig":
        if self.stage_ranks is not None and max(self.stage_ranks, default=0) != self.rank:
            raise ValueError(f"stage_ranks is {self.stage_ranks}, but its largest must equal rank = {self.rank}")
        return self

    @property
    def is_head(self) -> bool:
        """Whether an adapter of this config is only a head on the frozen backbone's features."""
        return self.kernels == 0 and self.rescale == "none" and not self.norms

    def select(self, layers: Sequence[Layer]) -> list[Layer]:
        """Return the sites or norms of a backbone whose names match `sites`, with `fnmatch` patterns."""
        if self.sites is None:
            return list(layers)
        patterns = self.sites
        return [layer for layer in layers if any(fnmatchcase(layer.name, pattern) for pattern in patterns)]

    def rank_at(self, stage: int | None) -> int:
        """Return the rank of a layer in this stage of the backbone, counted from 0; None is a layer in no stage.

        Raises:
            ConfigError: `stage_ranks` has no rank for the stage.
        """
        if self.stage_ranks is None:
            return self.rank
        if stage is None or stage >= len(self.stage_ranks):
            raise ConfigError(
                f"stage_ranks has {len(self.stage_ranks)} ranks, but the backbone has a layer "
                + ("in no stage" if stage is None else f"in stage {stage}, counted from 0")
                + "; give one rank per stage, or only `rank`"
            )
        return self.stage_ranks[stage]

    def gain_at(self, stage: int | None) -> float:
        """Return the gain of a layer in this stage: 1 / its rank where the config has no gain."""
        return self.gain if self.gain is not None else 1.0 / self.rank_at(stage)

    @property
    def effective_gain(self) -> float:
        """The gain that the file stores: 1 / rank where the config has no gain, as in the official code."""
        return self.gain if self.gain is not None else 1.0 / self.rank


# Sizes of the official scripts (docs/method.md), with the paper's re-scaling: one number per channel.
PRESETS = MappingProxyType(
    {
        "karst-vtab": KarstConfig(kernels=8),
        "karst-fewshot": KarstConfig(kernels=2, norms=True),
        "karst-swin": KarstConfig(kernels=2, stage_ranks=(2, 2, 4, 8)),
    }
)
