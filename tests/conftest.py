"""The fixtures of test_msd.py, for the tests in this folder, too."""

import signal

from test_msd import finished, tokenizer, world  # noqa: F401

# A job in the background starts with it ignored, and so would the runs that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
