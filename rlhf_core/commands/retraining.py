"""`rlhf retrain` and `rlhf simulate`; what they start stands above this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("-S", "--set", help="section.key=value; may be repeated.")
]
Profile = Annotated[str, typer.Option(help="A profile of configs/profiles to apply first.")]


def add_to(app: typer.Typer, become: Callable[[str, list[str]], None]) -> None:
    """Add the commands to `app`; `become` replaces this process by a module."""

    @app.command()
    def retrain(
        profile: Profile = "",
        overrides: Overrides = None,
        force: Annotated[
            bool, typer.Option("--force", help="Also with fewer new votes than retrain.min_votes.")
        ] = False,
    ) -> None:
        """Train on people's votes, old and new, when there are enough new ones; registers a candidate."""
        options = ["--profile", profile] if profile else []
        become("flows.retrain", [*options, *_set(overrides), *(["--force"] if force else [])])

    @app.command()
    def simulate(
        rounds: Annotated[int, typer.Option(min=1, help="Of collecting, voting, training, promoting.")] = 3,
        name: Annotated[str, typer.Option(help="Its directory below .rlhf/simulations.")] = "default",
        profile: Profile = "simulate",
        overrides: Overrides = None,
    ) -> None:
        """The whole loop with simulated people, apart from your votes and models; goes on after a kill."""
        options = ["--rounds", str(rounds), "--name", name, "--profile", profile]
        become("flows.simulate", [*options, *_set(overrides)])


def _set(overrides: list[str] | None) -> list[str]:
    return [word for text in overrides or [] for word in ("-S", text)]
