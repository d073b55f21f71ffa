"""Defaults and ranges that several parts share. Imports nothing, so that the command line can name them for free."""

MAX_BITS = 8
DTYPES = ("float32", "bfloat16", "float16", "float64")  # that can be coded
DEFAULT_BITS = 3  # of codes of the derivative alone
DEFAULT_LAYER_BITS = 4  # of codes of values
DEFAULT_MODEL_BITS = 5  # of whole models: what 4 cost at the end of training is seen (`tools.studies.final_loss`)
REST_BITS = 8  # of kind "rest" at least, where bits are one number for every kind
# of what is kept for backward. "linear" is the inputs of linear layers and convolutions, "product" of elementwise products.
KINDS = ("activation", "linear", "norm", "product", "attention", "recurrent", "rest")
DEFAULT_WEIGHT = "student"  # of tables that hold the derivative alone, which tolerate heavy tails
VALUE_WEIGHT = "normal"  # of all others: values want light tails
DEFAULT_DOMAIN = (-10.0, 10.0)
CHANNELS = ("derivative", "value")
EXACT = "exact"  # the kind of what codes that lose nothing keep: any conversion has them, and no bits are for it
CODINGS = ("level", "interval", "uniform")
WEIGHTS = ("student", "normal", "uniform")
RUNGS = tuple(2.0**k for k in range(-4, 5))  # standard deviations of the pre-activations that a ladder has tables for
SHIPPED_BITS = (1, 2, 3, 4)
SHIPPED_CODINGS = ("level", "interval")
