"""Shared by all tests: one thread (tiny models are slower with more), no network, quiet libraries."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")

import diffusers  # noqa: F401  (now: its log handler keeps the stderr it finds, which in a test ends with the test)
import torch

torch.set_num_threads(1)
