"""How a model is written, whatever its target."""

from __future__ import annotations

from dataclasses import dataclass

from ..formats.bundle import INPUTS
from ..inputs.modality import Preparation
from ..method.feature_spec import LAST, FeatureSpec


@dataclass(frozen=True)
class ModelForm:
    """The shape and the precision of an exported model.

    Attributes:
        prepare: what it reads.
        precision: of all that is not adapted.
        weights_as: `bundle.INPUTS`, CONSTANTS or PLAIN_INPUTS.
        capacity: rows of the head. 0: as many as there are classes, and any number later.
        features: what the head sees.
    """

    prepare: Preparation
    precision: str = "fp32"
    weights_as: str = INPUTS
    capacity: int = 0
    features: FeatureSpec = LAST
