"""Checkpoints of other formats in, ours out, and dense models upcycled into mixtures of experts."""

from .conversion import Report, convert
from .formats import AOE_FIRST, AOE_SECOND, FORMATS
from .tables import from_ours, to_ours
from .upcycling import upcycle

__all__ = ["AOE_FIRST", "AOE_SECOND", "FORMATS", "Report", "convert", "from_ours", "to_ours", "upcycle"]
