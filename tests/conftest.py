"""Settings that every test shares: property tests draw the same examples each time and are not timed one by one."""

from hypothesis import settings

settings.register_profile("stepwell", deadline=None, max_examples=30, derandomize=True, database=None)
settings.load_profile("stepwell")
