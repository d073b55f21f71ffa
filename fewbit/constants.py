"""Defaults and ranges that several parts share. This file imports nothing, so the command line gets them without delay."""

MAX_BITS = 8
DTYPES = ("float32", "bfloat16", "float16", "float64")  # dtypes of tensors that can be coded
DEFAULT_BITS = 3  # for codes of the derivative alone
DEFAULT_LAYER_BITS = 4  # for codes of values
DEFAULT_MODEL_BITS = 5  # for whole models: 4 visibly raise the loss at the end of training (`tools.studies.final_loss`)
REST_BITS = 8  # least bits of kind "rest" if the user gives one number of bits for all kinds
# Kinds of what is kept for backward. "linear" is inputs of linear layers and convolutions, "product" of elementwise products.
KINDS = ("activation", "linear", "norm", "product", "attention", "recurrent", "rest")
DEFAULT_WEIGHT = "student"  # for tables of the derivative alone, which tolerate heavy tails
VALUE_WEIGHT = "normal"  # for all other tables, because values want light tails
DEFAULT_DOMAIN = (-10.0, 10.0)
CHANNELS = ("derivative", "value")
EXACT = "exact"  # kind of what exact codes keep; every conversion uses them, and they take no bits
CODINGS = ("level", "interval", "uniform")
WEIGHTS = ("student", "normal", "uniform")
RUNGS = tuple(2.0**k for k in range(-4, 5))  # standard deviations of pre-activations: a ladder has a table for each
SHIPPED_BITS = (1, 2, 3, 4, 5)
SHIPPED_CODINGS = ("level", "interval")
