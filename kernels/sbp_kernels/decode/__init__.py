"""Attention of the newest tokens over paged keys and values, those of a seed shared by its samples."""

from sbp_kernels.decode.api import append_to_pages, decode_attention, write_to_pages
from sbp_kernels.decode.layout import DecodeLayout

__all__ = ["DecodeLayout", "append_to_pages", "decode_attention", "write_to_pages"]
