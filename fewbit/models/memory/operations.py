"""Plain words for operations. Autograd only knows the names of its nodes."""

from __future__ import annotations

import re

from fewbit.activations import BUILT_IN

# kind, as conversions name it -> its words in pictures
KIND_WORDS = {
    "linear": "matrix products, convolutions",
    "attention": "attention",
    "activation": "activations",
    "norm": "norms",
    "product": "elementwise products",
    "recurrent": "recurrent layers",
    "rest": "all else",
}
_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Addbmm", "Addmv", "Mv", "Dot", "Linear", "CodedProduct")
_OWN = {  # nodes of this package
    "Activation": "activation",
    "CodedActivation": "activation",
    "ActivationBySign": "activation",
    "CodedNormalization": "norm",
    "CodedGate": "gated product",
    "Product": "product",
    "CodedMaxPool": "max pool",
    "CodedDropout": "dropout",
    "CodedRecurrent": "recurrent layer",
    "WithoutInput": "activation",
}
_WORDS = {
    "Mul": "product",
    "Pow": "power",
    "Div": "division",
    "NllLoss": "loss",
    "Log1P": "log1p",
    "LinalgVectorNorm": "vector norm",
}
_ACTIVATIONS = {*(name.replace("_", "") for name in BUILT_IN), "prelu", "rrelu", "hardswish", "activation"}


def plain_operation(name: str) -> str:
    """Plain words for the operation of an autograd node. Exact and coded operations get the same words.

    >>> [plain_operation(each) for each in ("Addmm", "ScaledDotProductFlashAttentionForCpu", "NativeLayerNorm", "LogSoftmax")]
    ['matrix product', 'attention', 'layer norm', 'log softmax']
    >>> [plain_operation(each) for each in ("CodedProduct", "CodedNormalization", "MaxPool2DWithIndices", "Mul")]
    ['matrix product', 'norm', 'max pool', 'product']
    """
    name = re.sub(r"^_", "", name)
    if re.search("(?i)attention", name):
        return "attention"
    if name in _PRODUCTS:
        return "matrix product"
    if name in _OWN or name in _WORDS:
        return _OWN.get(name) or _WORDS[name]
    name = re.sub(r"^(Native|Cudnn|Mkldnn|Miopen)|(\dD)?(WithIndices)?$|0$", "", name) or name
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    return " ".join(each if each.isupper() and len(each) > 1 else each.lower() for each in words) or name


def kind_of(name: str) -> str:
    """The kind of an operation, one of KIND_WORDS.

    >>> [kind_of(each) for each in ("Addmm", "Convolution", "Gelu", "CodedNormalization", "Mul", "MkldnnRnnLayer", "Exp")]
    ['linear', 'linear', 'activation', 'norm', 'product', 'recurrent', 'rest']
    """
    words = plain_operation(name)
    if "convolution" in words:
        return "linear"
    if words.replace(" ", "") in _ACTIVATIONS:
        return "activation"
    if re.search(r"\bnorm$", words) and words != "vector norm":
        return "norm"
    known = {"matrix product": "linear", "attention": "attention", "product": "product", "gated product": "product"}
    return known.get(words) or ("recurrent" if re.search(r"rnn|lstm|gru|recurrent", words) else "rest")
