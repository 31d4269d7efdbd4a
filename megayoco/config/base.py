"""What every section of the config shares: strict frozen dataclasses, range types, errors that name a field."""

from typing import Annotated, Any, NoReturn

from pydantic import ConfigDict, Field
from pydantic_core import PydanticCustomError

# sizes are multiplied with each other, as floats too: beyond this they would lose digits or overflow
PositiveInt = Annotated[int, Field(gt=0, lt=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**53)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]

SECTION = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Nothing is converted silently ("3" is no integer), nothing unknown is accepted, docstrings become descriptions."""


def refuse(field: str, message: str) -> NoReturn:
    """Raise a validation error about `field` of the section being validated; the message goes after its name."""
    # braces would be taken for placeholders, so the text travels in the context
    context: dict[str, Any] = {"field": field, "message": message}
    raise PydanticCustomError("refused", "{field} {message}", context)
