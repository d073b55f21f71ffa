"""The exceptions that fewbit raises on purpose. Each message states the rule, what was got, and the remedy."""

from fewbit.text import cut, plain


class _Plain(Exception):
    """Its message is safe to print: control characters in names and values are escaped, and long texts are cut."""

    def __str__(self) -> str:
        return cut(plain(super().__str__()), 2000)


class FewbitError(_Plain):
    """Base class of all errors that fewbit raises on purpose."""


class ActivationError(FewbitError, LookupError):
    """The registry does not know an activation, or cannot use one of its parameters."""


class DesignError(FewbitError, ValueError):
    """No design can meet the request: bits, weight, coding, channels or domain are out of range."""


class TableError(FewbitError, ValueError):
    """A code table breaks an invariant, or does not fit the operation that it was given to."""


class TableFileError(TableError):
    """A table file is missing, damaged, of another format, or of a newer version."""


class InputError(FewbitError, TypeError):
    """A call cannot take an argument, or codes cannot give a derivative.

    Such arguments are a tensor that cannot be coded, or something that is not a model, batch, loss or filter.
    """


class OverwriteError(InputError, RuntimeError):
    """An in-place operation on a tensor that torch does not allow to be overwritten. torch itself raises a RuntimeError."""


class ConversionWarning(_Plain, UserWarning):
    """A conversion found nothing to convert."""


class DriftWarning(_Plain, UserWarning):
    """The inputs of a layer have drifted away from the inputs that its table was designed for.

    The derivative or value that backward reads has a larger error.
    """
