"""Trainers of the built-in models: a recipe names stages, a stage names a task and its options."""

from guidekit.train.loop import Loop, Options

__all__ = ["Loop", "Options"]
