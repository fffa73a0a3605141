"""`rlhf collect` and `rlhf collections`; what they start stands above this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("-S", "--set", help="section.key=value, for this collection only.")
]


def add_to(app: typer.Typer, become: Callable[[str, list[str]], None]) -> None:
    """Add the commands to `app`; `become` replaces this process by a module."""

    @app.command()
    def collect(
        size: Annotated[int, typer.Option(min=0, help="Prompts to ask; 0: as in params.yaml.")] = 0,
        choose: Annotated[
            str, typer.Option(help="random, uncertain, disagreement or production; keep: as in params.yaml.")
        ] = "keep",
        overrides: Overrides = None,
        close: Annotated[str, typer.Option(metavar="ID", help="End a collection by hand instead.")] = "",
    ) -> None:
        """Let two policies answer prompts, and put the answers before people."""
        if close:
            become("tasks.collections", ["--close", close])
        options = ["--size", str(size), "--choose", choose]
        for text in overrides or []:
            options += ["-S", text]
        become("flows.collect_feedback", options)

    @app.command()
    def collections() -> None:
        """List collections of feedback: open or ended, votes, deadline."""
        become("tasks.collections", [])
