"""What shape an adapter has: kernels, rank, factor, gain and re-scaling."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Rescale = Literal["channel", "scalar", "none"]


class KarstConfig(BaseModel):
    """The hyper-parameters of one KARST adapter (KARST.md, "The method")."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kernels: int = Field(2, ge=1, le=256, description="N, how many Kronecker products are summed in a layer")
    rank: int = Field(8, ge=1, le=1024, description="r, the inner dimension of A_i B_i")
    factor: int = Field(8, ge=1, le=1024, description="p = q, the side of C_i where it divides the layer's sides")
    gain: float | None = Field(None, gt=0, allow_inf_nan=False, description="g, fixed; None means 1 / rank")
    rescale: Rescale = Field("channel", description="one scale and shift per channel, per layer, or none")

    @property
    def effective_gain(self) -> float:
        """g as a number: the official code's default multiplier 1 and alpha 1 give 1 / rank."""
        return self.gain if self.gain is not None else 1.0 / self.rank
