"""The command line: one command per thing a user does, each a thin door to a function of the library."""

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
