"""Defaults and ranges that several parts share. Imports nothing, so that the command line can name them for free."""

MAX_BITS = 8
DEFAULT_BITS = 3
DEFAULT_WEIGHT = "student"
DEFAULT_DOMAIN = (-10.0, 10.0)
CHANNELS = ("derivative", "value")
CODINGS = ("level", "interval")
WEIGHTS = ("student", "normal", "uniform")
SHIPPED_BITS = (1, 2, 3, 4)
