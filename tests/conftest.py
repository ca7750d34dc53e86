"""The fixtures of test_msd.py, for the tests in this folder, too."""

from test_msd import finished, tokenizer, world  # noqa: F401
