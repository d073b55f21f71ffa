"""Encode and decode. One backend per file, all under the contract of `fewbit.kernels.reference`."""

from fewbit.kernels.reference import decode, encode

__all__ = ["decode", "encode"]
