"""The exceptions that fewbit raises on purpose: each message states the rule, what was got, and the remedy."""

from fewbit.text import cut, plain


class _Plain(Exception):
    """No name or value in its message commands a terminal, or fills it."""

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
    """An operation in place on a tensor that torch does not let overwrite, for which torch itself raises a RuntimeError."""


class ConversionWarning(_Plain, UserWarning):
    """A conversion found nothing to convert."""


class DriftWarning(_Plain, UserWarning):
    """The inputs of a layer have drifted away from the inputs that its table was designed for.

    Its derivative or value errs more.
    """
