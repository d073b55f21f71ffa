"""Defaults and ranges that several parts share. Imports nothing, so that the command line can name them for free."""

MAX_BITS = 8
DEFAULT_BITS = 3
DEFAULT_LAYER_BITS = 4  # of layers with weights
DEFAULT_WEIGHT = "student"  # of tables that hold the derivative alone, which tolerate heavy tails
VALUE_WEIGHT = "normal"  # of all others: values want light tails
DEFAULT_DOMAIN = (-10.0, 10.0)
CHANNELS = ("derivative", "value")
CODINGS = ("level", "interval", "uniform")
WEIGHTS = ("student", "normal", "uniform")
SHIPPED_BITS = (1, 2, 3, 4)
SHIPPED_CODINGS = ("level", "interval")
