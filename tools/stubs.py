"""Write the stubs that show editors and type checkers the names that fewbit makes on demand.

.venv/bin/python tools/stubs.py            # writes fewbit/__init__.pyi, fewbit/functional/__init__.pyi, fewbit/nn/__init__.pyi
.venv/bin/python tools/stubs.py --check    # writes nothing; fails if one would change
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

from torch import nn

import fewbit
from fewbit import activations
from fewbit.functional import exact_codes, layers
from fewbit.nn.activations import CodedActivation
from fewbit.nn.exact_codes import CLASSES as EXACT_CODES
from fewbit.nn.layers import CLASSES as LAYERS
from fewbit.nn.recurrent import CLASSES as RECURRENT

ROOT = Path(fewbit.__file__).parent
HEAD = '"""Written by tools/stubs.py."""\n\n'
_NAMES = [*dict.fromkeys(record.module for record in activations.BUILT_IN.values()), *LAYERS, *RECURRENT, *EXACT_CODES]


def stubs() -> dict[Path, str]:
    """File -> its text."""
    found = {"": _package(), "functional": _functions(), "nn": _modules()}
    return {ROOT / folder / "__init__.pyi": _formatted(HEAD + text) for folder, text in found.items()}


def _formatted(text: str) -> str:
    for command in (["check", "--select", "F401,I,RUF036,UP007", "--fix", "--quiet"], ["format"]):
        ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", ROOT / "stub.pyi", "-"]
        text = subprocess.run(ruff, input=text, capture_output=True, text=True, check=True).stdout
    return text


def _package() -> str:
    lines = ["from fewbit.design import design as design"]
    for name, home in vars(fewbit)["_HOMES"].items():
        lines.append(f"from {home} import {name} as {name}")
    lines += [f"from fewbit.nn import {name} as {name}" for name in _NAMES]
    return "\n".join(lines) + "\n\n__version__: str\n"


def _functions() -> str:
    names = *activations.BUILT_IN, *layers.FUNCTIONS, *exact_codes.FUNCTIONS
    functions = [getattr(fewbit.functional, name) for name in names]
    lines = [f"def {each.__name__}({_parameters(each)}) -> {_returned(each)}: ..." for each in functions]
    imports = "from collections.abc import Callable, Sequence\nfrom typing import Any\n\nfrom torch import Tensor\n\n"
    others = "def __getattr__(name: str) -> Callable[..., Tensor]: ...  # those of fewbit.register\n"
    return imports + "from fewbit.design.table import CodeTable\n\n" + "\n".join(lines) + "\n" + others


def _modules() -> str:
    classes = "\n".join(_module(getattr(fewbit.nn, name)) for name in _NAMES)
    imports = "from typing import Any, Literal, Union\n\nimport torch\nfrom torch import Tensor\n\n"
    others = "\ndef __getattr__(name: str) -> Any: ...  # those of fewbit.register\n"
    return imports + "from fewbit.design.table import CodeTable\n\n" + classes + others


def _module(cls: type[nn.Module]) -> str:
    torchs = getattr(nn, cls.__name__, nn.Module)
    added = {"shared": "bool", "inplace": "bool"} if issubclass(cls, CodedActivation) else {"rounding": "str"}
    attributes = {} if cls in EXACT_CODES.values() else {"bits": "int | None", "table": "CodeTable | None", **added}
    lines = [f"class {cls.__name__}(torch.nn.{torchs.__name__}):"]
    lines += [f"    {name}: {kind}" for name, kind in attributes.items()]
    parameters = _parameters(cls)
    lines.append(f"    def __init__(self{', ' * bool(parameters)}{parameters}) -> None: ...")
    forward = list(inspect.signature(cls.forward).parameters.values())[1:]
    inputs = ", ".join(_parameter(each) for each in forward if each.name != "up" or cls in LAYERS.values())
    lines.append(f"    def forward(self, {inputs}) -> {_returned(cls.forward)}: ...")
    return "\n".join(lines)


def _returned(function: object) -> str:
    """The type in the stub: Any for functions that return a tensor, or a tuple if asked for more; a tuple; else Tensor."""
    returned = inspect.signature(function).return_annotation  # type: ignore[arg-type]
    return returned if returned in ("Any", "tuple[Tensor, ...]") else "Tensor"


def _parameters(of: object) -> str:
    parts, keyword = [], False
    for each in inspect.signature(of).parameters.values():  # type: ignore[arg-type]
        if each.kind is each.KEYWORD_ONLY and not keyword:
            keyword = True
            parts.append("*")
        parts.append(_parameter(each))
    return ", ".join(parts)


def _parameter(parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    text = "Any" if kind is parameter.empty else kind if isinstance(kind, str) else inspect.formatannotation(kind)
    text = "Tensor" if text == "torch.Tensor" else text.replace("NoneType", "None")
    if parameter.default is None and not {"None", "Any", "Optional"} & set(re.findall(r"\w+", text)):
        text += " | None"  # torch leaves it out
    return f"{parameter.name}: {text}" + ("" if parameter.default is parameter.empty else f" = {parameter.default!r}")


def main(arguments: list[str]) -> int:
    changed = [path for path, text in stubs().items() if not path.exists() or path.read_text() != text]
    if "--check" not in arguments:
        for path in changed:
            path.write_text(stubs()[path])
    for path in changed:
        print(f"{path.relative_to(ROOT.parent)} {'differs' if '--check' in arguments else 'written'}")
    return int(bool(changed) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
