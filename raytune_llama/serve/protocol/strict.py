"""What every object of a request is: known fields alone, and no value converted."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A part of a request. A field that is not known is refused, and "3" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)
