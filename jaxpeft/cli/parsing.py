"""How are mistakes in a command said? In one line, with what was meant."""

import argparse
from typing import Any, NoReturn

from jaxpeft.spec import nearest


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without the usage before an error, which `--help` shows."""

    def error(self, message: str) -> NoReturn:
        """Prints one line on stderr and exits with code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """The check of `choices`, of commands as of options."""
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"unknown {value!r}; {nearest(str(value), known)}")
