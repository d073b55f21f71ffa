"""Classes recognized by what their methods do, not by their names: by bytecode, that of a template but for some names."""

from __future__ import annotations

import dis
import types
from collections.abc import Collection

_KINDS = 0xFEF  # the flags of code that say what it is; not where it is nested, and, those above, what it has from __future__
Names = dict[str, str]  # role -> the attribute's name


def names_in(function: object, template: types.FunctionType, roles: Collection[str]) -> Names | None:
    """The names in a method (self, x) for the roles in the template, if all else but the names of variables is the same.

    roles  the attributes that may have any name, each another one
    """
    if not isinstance(function, types.FunctionType):
        return None
    code, wanted = function.__code__, template.__code__
    if (code.co_argcount, code.co_kwonlyargcount, code.co_cellvars) != (2, 0, ()) or (code.co_flags ^ wanted.co_flags) & _KINDS:
        return None
    names: Names = {}
    instructions = _instructions(wanted), _instructions(code)
    if len(instructions[0]) != len(instructions[1]):
        return None
    for ours, theirs in zip(*instructions, strict=True):
        if ours[0] == "name" == theirs[0] and ours[1] in roles:
            if names.setdefault(ours[1], theirs[1]) != theirs[1]:
                return None
        elif ours != theirs:
            return None
    same_globals = all(function.__globals__.get(name) is template.__globals__.get(name) for name in ("torch", "isinstance"))
    return names if same_globals and len({*names.values()}) == len(names) else None


def _instructions(code: types.CodeType) -> list[tuple]:
    """A name or a constant by itself, variables by their number, jumps by their distance; no line numbers, no docstring."""
    found = []
    for each in dis.get_instructions(code):
        if each.opcode in dis.hasname:
            found.append(("name", each.argval, each.opname))
        elif each.opcode in dis.hasconst:
            constant = code.co_consts[each.arg or 0]
            found.append((each.opname, type(constant), constant))
        else:
            found.append((each.opname, each.arg))
    return found
