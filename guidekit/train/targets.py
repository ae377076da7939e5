"""What a model is to predict, by the prediction type of its scheduler."""

from typing import Any

from torch import Tensor

from guidekit.errors import GuidekitError


def model_target(scheduler: Any, x0: Tensor, eps: Tensor, timestep: Tensor) -> Tensor:
    """The target (B, C, h, w) for clean x0 and noise eps at timestep (B,).

    Raises GuidekitError for a prediction type that trainers do not know.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "v_prediction":
        return scheduler.get_velocity(x0, eps, timestep)
    raise GuidekitError(
        f"the backbone predicts {kind}; trainers know epsilon, sample and v_prediction"
    )
