"""Settings for every test."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton when it meets a kernel, so before any is imported

settings.register_profile("sbp-fast", deadline=None)  # a busy machine is not a failure
settings.load_profile("sbp-fast")
