"""How the commands print tables."""

from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table


def new_console(file: TextIO | None = None, width: int | None = None) -> Console:
    """A console on stdout, or on a file, that prints text as it is: brackets are no markup."""
    return Console(markup=False, highlight=False, file=file, width=width)


def new_table(*columns: str, numbers: bool = False) -> Table:
    """An empty table; the first column is not broken, and with `numbers` all others are aligned right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if numbers and index else "left", overflow="fold", no_wrap=index == 0)
    return table
