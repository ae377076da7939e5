"""Shared set-up: one torch thread, no downloads."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402  (the variable must be set before any hub library is imported)

torch.set_num_threads(1)
