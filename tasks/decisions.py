"""Decisions about the champion: approve, reject, roll back. The ledger says which one counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NoReturn

from mlflow.entities import RunTag
from mlflow.exceptions import MlflowException

from rlhf_core.errors import InputError, RLHFError
from rlhf_core.mlflow_writer import experiment_id, open_client, tracking_uri
from tasks.ledger import CHAMPION, PROMOTE, REJECT, ROLLBACK, Entry, Ledger, replay
from tasks.promotion import (
    ARTIFACTS,
    COMPARING,
    FAILED,
    LOST,
    PENDING,
    PROMOTED,
    REJECTED,
    ROLLED_BACK,
    STATE,
    Promotion,
    now,
    read,
)

AUTO = "auto"
LOGIN_VARIABLE = "PREFECT_API_AUTH_STRING"  # USER:PASSWORD
Decision = Literal["approve", "reject"]


class LostPromotion(RLHFError):
    """Another decision was there first."""

    exit_code = 4


def settle_decision(root: Path, run_id: str, decision: Decision, by: str, reason: str) -> str:
    """Decide a promotion that waits; what came of it, in one sentence.

    The same decision asked twice is told again.

    Raises InputError for a promotion that cannot be decided so, and LostPromotion when another decision was
    first: somebody else's on this promotion, or one that made another version the champion meanwhile.
    """
    promotion = read(root, run_id)
    _check_decision(promotion, decision, by, reason)
    client = open_client(root)
    ledger = Ledger(client, promotion.name)
    ledger.settle()
    number = _write_decision(client, ledger, promotion, decision, by.strip(), reason.strip())
    counted = ledger.standing().decided.get(run_id)
    if counted is None or (counted.kind == PROMOTE) != (decision == "approve"):
        _tell_loser(client, ledger, promotion, counted)
    if counted.number == number or promotion.state == PENDING:  # ours, or of one who died before he was done
        _carry_out(client, ledger, promotion, counted)
    where = f"{promotion.name} version {promotion.candidate}"
    if counted.number != number:
        word = "promoted" if counted.kind == PROMOTE else "rejected"
        return f"{where} was {word} already, by {counted.by} at {counted.time}: {counted.reason}"
    if counted.kind == REJECT:
        return f"{where} was rejected by {counted.by}: {counted.reason}"
    was = f", in place of version {promotion.opponent}" if promotion.opponent else ""
    return f"{where} is the champion{was} (by {counted.by})"


def _carry_out(client: Any, ledger: Ledger, promotion: Promotion, counted: Entry) -> None:
    """Aliases first, then what the version and the promotion's run say of it; may be done twice."""
    if counted.kind == PROMOTE:
        ledger.apply()
    else:
        ledger.withdraw_candidate(promotion.candidate)
    said = {
        "promotion.decision": counted.kind,
        "promotion.by": counted.by,
        "promotion.reason": counted.reason,
        "promotion.time": counted.time,
    }
    for key, value in said.items():
        client.set_model_version_tag(promotion.name, promotion.candidate, key, value)
    state = PROMOTED if counted.kind == PROMOTE else REJECTED
    tags = [RunTag(k, v) for k, v in (said | {STATE: state}).items()]
    client.log_batch(promotion.run_id, tags=tags)


def _check_decision(promotion: Promotion, decision: str, by: str, reason: str) -> None:
    if promotion.state == COMPARING:
        raise InputError(f"promotion {promotion.short_id}: has no verdict yet")
    if promotion.state == FAILED and decision == "approve":
        raise InputError(
            f"promotion {promotion.short_id}: the gate does not hold, so it cannot be approved: "
            f"{promotion.tags.get('gate.reasons', '')}"
        )
    if not by.strip() or not reason.strip():
        raise InputError("a decision needs a name and a reason, neither of them empty")
    if by.strip() == AUTO and promotion.outcome != "pass":
        raise InputError(
            f"promotion {promotion.short_id}: promotion.approval is auto, and the verdict is "
            f"'{promotion.outcome}': a person has to decide"
        )


def _write_decision(
    client: Any, ledger: Ledger, promotion: Promotion, decision: str, by: str, reason: str
) -> int:
    """Append the decision to the ledger, unless it could not count; its number, or 0."""
    standing = ledger.standing()
    head, expected = int(promotion.tags["promotion.head"]), promotion.opponent
    if promotion.run_id in standing.decided:
        return 0
    champion = ledger.aliases().get(CHAMPION, "")
    if decision == "approve" and (standing.head != head or champion != expected):
        return 0
    return ledger.append(
        run_id=promotion.run_id,
        source=f"{client.get_run(promotion.run_id).info.artifact_uri}/{ARTIFACTS}",
        kind=PROMOTE if decision == "approve" else REJECT,
        base=str(head),
        promotion=promotion.run_id,
        was=expected,
        version=promotion.candidate,
        by=by,
        reason=reason,
    )


def _tell_loser(client: Any, ledger: Ledger, promotion: Promotion, counted: Entry | None) -> NoReturn:
    """Raise LostPromotion that says who was first: with the other decision, or with another version."""
    if counted is not None:
        word = "approved" if counted.kind == PROMOTE else "rejected"
        raise LostPromotion(
            f"promotion {promotion.short_id}: was {word} already, by {counted.by} at {counted.time}: "
            f"{counted.reason}"
        )
    entries = ledger.entries()
    standing = replay(entries)
    client.set_tag(promotion.run_id, STATE, LOST)
    first = next((entry for entry in entries if entry.number == standing.head), None)
    champion = ledger.aliases().get(CHAMPION, "")
    now = f"version {champion} is the champion now" if champion else "there is no champion now"
    who = (
        f", set by {first.by} at {first.time}"
        if first and first.base >= int(promotion.tags["promotion.head"])
        else ""
    )
    compared = f"champion {promotion.opponent}" if promotion.opponent else "its SFT model"
    raise LostPromotion(
        f"promotion {promotion.short_id}: version {promotion.candidate} was compared with {compared}, but "
        f"{now}{who}; nothing was changed. `rlhf promote` compares anew"
    )


def roll_back(root: Path, name: str, by: str, reason: str) -> str:
    """Make the champion before the last one the champion again; what came of it, in one sentence.

    Raises InputError when there is none, and LostPromotion when another decision was first.
    """
    if not by.strip() or not reason.strip():
        raise InputError("a rollback needs a name and a reason, neither of them empty")
    client = open_client(root)
    ledger = Ledger(client, name)
    try:
        standing, aliases = ledger.settle(), ledger.aliases()
    except MlflowException:
        raise InputError(f"{name}: no such registered model in {tracking_uri(root)}") from None
    champion = aliases.get(CHAMPION, "")
    by_hand = bool(champion) and champion != standing.champion
    target = standing.champion if by_hand else standing.previous
    if not target:
        raise InputError(f"{name}: there is no champion before {champion or 'the present one'} to go back to")
    try:
        client.get_model_version(name, target)
    except MlflowException:
        raise InputError(f"{name}: version {target}, the champion before, was deleted") from None
    tags = {STATE: ROLLED_BACK, "promotion.model": name, "promotion.by": by, "promotion.reason": reason}
    run = client.create_run(experiment_id(client, root), run_name="rollback", tags=tags)
    number = ledger.append(
        run_id=run.info.run_id,
        source=f"{run.info.artifact_uri}/{ARTIFACTS}",
        kind=ROLLBACK,
        base=str(standing.head),
        promotion=run.info.run_id,
        was=champion,
        version=target,
        by=by.strip(),
        reason=reason.strip(),
    )
    counts = number not in ledger.standing().void
    client.set_terminated(run.info.run_id, "FINISHED" if counts else "FAILED")
    if not counts:
        raise LostPromotion(f"{name}: another decision was first; nothing was changed. Look, and try again")
    ledger.apply()
    if champion:
        for key, value in (("rollback.by", by), ("rollback.reason", reason), ("rollback.time", now())):
            client.set_model_version_tag(name, champion, key, value)
    return f"{name} version {target} is the champion again, in place of version {champion} (by {by})"


def resume_flow_run(promotion: Promotion, decision: str, by: str, reason: str) -> bool:
    """Let the flow run that waits for this decision end, if its server can be reached.

    A server with a login gets the one that Prefect's own client would send.
    """
    import httpx

    user, _, password = os.environ.get(LOGIN_VARIABLE, "").partition(":")
    api, run = promotion.tags.get("prefect.api", ""), promotion.tags.get("prefect.flow_run", "")
    if not api or not run:
        return False
    body = {"run_input": {"decision": decision, "name": by, "reason": reason}}
    try:
        login = (user, password) if user else None
        reply = httpx.post(f"{api}/flow_runs/{run}/resume", json=body, auth=login, timeout=10.0)
        return reply.status_code < 300 and reply.json().get("status") == "ACCEPT"
    except (httpx.HTTPError, ValueError):
        return False
