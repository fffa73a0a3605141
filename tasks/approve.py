"""`rlhf approve` and `rlhf rollback`: decisions from a shell. No server is needed for them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf_core.config import load_params
from rlhf_core.errors import RLHFError
from rlhf_core.layout import Layout
from tasks import decisions, promotion


def approve(root: Path, part: str, decision: decisions.Decision, by: str, reason: str) -> str:
    """Decide the promotion whose id begins with `part`; a flow run that waits for it ends too."""
    name = load_params(Layout(root).params).flow.registered_model
    states = (promotion.PENDING,) if decision == "approve" else (promotion.PENDING, promotion.FAILED)
    found = promotion.find_waiting(root, name, part, states)
    said = decisions.settle_decision(root, found.run_id, decision, by, reason)
    decisions.resume_flow_run(found, decision, by, reason)
    return said


def listing(root: Path) -> str:
    """Promotions, newest first, and who holds each alias."""
    name = load_params(Layout(root).params).flow.registered_model
    lines = [
        f"{p.short_id}  {p.state:<9} {p.title}: {p.outcome or 'no verdict'}"
        + (f", win rate {float(p.tags['gate.win_rate']):.1%}" if "gate.win_rate" in p.tags else "")
        + (f"; {p.tags['promotion.by']}: {p.tags['promotion.reason']}" if "promotion.by" in p.tags else "")
        for p in promotion.promotions(root, name)
    ]
    return "\n".join(lines or ["no promotions yet; `rlhf promote` begins one"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="rlhf", description="Decide about the champion.")
    commands = parser.add_subparsers(dest="command", required=True)
    asked = commands.add_parser("approve")
    asked.add_argument("promotion", nargs="?", default="")
    asked.add_argument("--reject", action="store_true")
    commands.add_parser("list")
    for command in (asked, commands.add_parser("rollback")):
        command.add_argument("--name", default="")
        command.add_argument("--reason", default="")
    options = parser.parse_args()
    root = Path.cwd().resolve()
    try:
        if options.command == "list":
            print(listing(root))
        elif options.command == "rollback":
            name = load_params(Layout(root).params).flow.registered_model
            print(decisions.roll_back(root, name, options.name, options.reason))
        else:
            decision: decisions.Decision = "reject" if options.reject else "approve"
            print(approve(root, options.promotion, decision, options.name, options.reason))
    except RLHFError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
