"""Settings for every test."""

from hypothesis import settings

settings.register_profile("sbp-fast", deadline=None)  # a busy machine is not a failure
settings.load_profile("sbp-fast")
