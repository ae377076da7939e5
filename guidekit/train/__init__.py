"""Trainers of the built-in models: a recipe names stages, a stage names a task and its options."""
