"""What bounds each kernel on a GPU that need not be present: computed from data sheets and compiled resources."""

from .bounds import Bound, bound_of
from .devices import DEVICES, Device
from .loads import LOADS, expert_rows
from .table import page, write_page
from .works import SHAPES, Shape, Work, works

__all__ = [
    "DEVICES",
    "LOADS",
    "SHAPES",
    "Bound",
    "Device",
    "Shape",
    "Work",
    "bound_of",
    "expert_rows",
    "page",
    "works",
    "write_page",
]
