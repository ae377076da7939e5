"""Models of diffusers made again at other sizes."""

from typing import Any, TypeVar

from diffusers import ModelMixin

Model = TypeVar("Model", bound=ModelMixin)


def remade(model: Model, **fields: Any) -> Model:
    """A model of the same class and config but for these fields, with weights of its own.

    diffusers' `from_config` does not take a field that the config's file left out, as files of
    older versions do, unless the list of such fields goes first.
    """
    config = {k: v for k, v in model.config.items() if k != "_use_default_values"}
    return type(model).from_config(config | fields)
