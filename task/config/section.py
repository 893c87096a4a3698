"""What every section of the configuration is, and its numbers."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
# What of a pre-trained classifier is trained.
FineTuning = Literal["head", "last_blocks", "all", "discriminative"]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="in [0, 2^63)")]


class Section(BaseModel):
    """Values that cannot be changed, of exactly their types, and finite.

    The description of a field is what an error says that it must be.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
