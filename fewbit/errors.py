"""The exceptions that fewbit raises on purpose: each message states the rule, what was got, and the remedy."""

from fewbit.text import cut, plain


class _Plain(Exception):
    """No name or value in its message commands a terminal, or fills it."""

    def __str__(self) -> str:
        return cut(plain(super().__str__()), 2000)


class FewbitError(_Plain):
    """Base of every error that fewbit raises on purpose."""


class ActivationError(FewbitError, LookupError):
    """An activation, or one of its parameters, that the registry does not know or cannot use."""


class DesignError(FewbitError, ValueError):
    """A request for a table that no design can meet: bits, weight, coding, channels or domain out of range."""


class TableError(FewbitError, ValueError):
    """A code table that breaks an invariant or does not fit the operation it was given to."""


class TableFileError(TableError):
    """A table file that is missing, damaged, of another format, or of a newer version."""


class InputError(FewbitError, TypeError):
    """An argument that a call cannot take (a tensor that cannot be coded, something that is no model, batch, loss or filter),
    or a derivative that codes cannot give."""


class OverwriteError(InputError, RuntimeError):
    """An operation in place on a tensor that torch does not let overwrite, for which torch itself raises a RuntimeError."""


class ConversionWarning(_Plain, UserWarning):
    """A conversion that found nothing to convert."""


class DriftWarning(_Plain, UserWarning):
    """The inputs of a layer have drifted away from what its table was designed for: its derivative or value errs more."""
