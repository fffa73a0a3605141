"""`rlhf promote`, `approve`, `promotions` and `rollback`; what they start stands above this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("-S", "--set", help="section.key=value, for this promotion only.")
]
Name = Annotated[str, typer.Option(help="Who decides; it stays with the version.")]
Reason = Annotated[str, typer.Option(help="Why; it stays with the version.")]


def add_to(app: typer.Typer, become: Callable[[str, list[str]], None]) -> None:
    """Add the commands to `app`; `become` replaces this process by a module."""

    @app.command()
    def promote(
        version: Annotated[str, typer.Option(help="Empty: the one with the alias candidate.")] = "",
        approval: Annotated[str, typer.Option(help="person or auto; empty: as in params.yaml.")] = "",
        overrides: Overrides = None,
    ) -> None:
        """Compare a candidate with the champion anew; a person then approves, unless approval is auto."""
        options = ["--version", version]
        if approval:
            options += ["--approval", approval]
        for text in overrides or []:
            options += ["-S", text]
        become("flows.promote", options)

    @app.command()
    def approve(
        promotion: Annotated[str, typer.Argument(help="Its id; may be left out when one waits.")] = "",
        name: Name = "",
        reason: Reason = "",
        reject: Annotated[bool, typer.Option("--reject", help="Say no instead.")] = False,
    ) -> None:
        """Decide a promotion that waits: make the candidate the champion, or reject it."""
        options = ["--name", name, "--reason", reason, *(["--reject"] if reject else [])]
        become("tasks.approve", ["approve", *options, *([promotion] if promotion else [])])

    @app.command()
    def promotions() -> None:
        """List promotions: what was compared, the verdict, who decided."""
        become("tasks.approve", ["list"])

    @app.command()
    def rollback(name: Name = "", reason: Reason = "") -> None:
        """Make the champion before the last one the champion again."""
        become("tasks.approve", ["rollback", "--name", name, "--reason", reason])
