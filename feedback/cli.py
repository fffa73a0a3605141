"""`rlhf feedback`: the service, and what is done to its store without a browser."""

from __future__ import annotations

import ipaddress
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from feedback.errors import FeedbackError, InputError
from feedback.exporting import Export, text_of
from feedback.records import Role, TaskKind

if TYPE_CHECKING:
    from datetime import datetime

    from feedback.formats.reading import Imported
    from feedback.records import Annotator, Project
    from feedback.store import Store

app = typer.Typer(
    help="Collect what people say about answers.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Form(StrEnum):
    """What `import` reads."""

    ITEMS = "items"
    LABEL_STUDIO = "label-studio"
    ARGILLA = "argilla"
    TRL = "trl"


class Ties(StrEnum):
    """What becomes of ties in rows; see RowRules."""

    KEEP = "keep"
    DROP = "drop"
    SOFTEN = "soften"


STATE = Path(".rlhf") / "feedback"
DATABASE = STATE / "feedback.db"
FIRST_MANAGER = "manager"
TOKEN_FILE = "manager.token"

Database = Annotated[
    str,
    typer.Option(
        envvar="RLHF_FEEDBACK_DB", help="A file of SQLite, or a URL such as postgresql://host/name."
    ),
]
Share = Annotated[float, typer.Option(min=0.0, max=1.0)]


@app.command()
def serve(
    database: Database = str(DATABASE),
    host: Annotated[str, typer.Option(help="Where to listen; other machines need accounts.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8600,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="NAME=TARGET for chats: echo, a chat endpoint's URL or module:function."),
    ] = None,
    no_login: Annotated[
        bool, typer.Option("--no-login", help="Everybody is the manager `local`; on loopback alone.")
    ] = False,
    secure: Annotated[bool, typer.Option("--secure", help="Behind HTTPS: cookies go over it alone.")] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name under which the service may be asked; may be repeated.")
    ] = None,
) -> None:
    """Serve the pages until Ctrl-C."""
    import uvicorn

    from feedback.policies import make_policy
    from feedback.web.app import create_app
    from feedback.web.context import Settings

    policies = {name: make_policy(target) for name, target in map(_name_and_target, policy or [])}
    store = _open(database)
    loopback = is_loopback(host)
    refuse_open_doors(store, host, no_login)
    hosts = ("127.0.0.1", "localhost", *(allowed_host or [])) if loopback else tuple(allowed_host or ["*"])
    local = _local_manager(store) if no_login else None
    if local is None and loopback:
        _make_first_manager(store)
    settings = Settings(policies=policies, secure=secure, hosts=hosts, local=local)
    typer.echo(f"Feedback  http://{host}:{port}", err=False)
    sys.stdout.flush()
    try:
        uvicorn.run(
            create_app(store, settings),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=10,
        )
    finally:
        store.close()


@app.command("create-project")
def create_project_command(
    project_id: Annotated[str, typer.Argument(metavar="ID")],
    kind: Annotated[TaskKind, typer.Option(help="What is asked.")],
    file: Annotated[Path | None, typer.Option(help="Items as JSON lines.")] = None,
    name: str = "",
    guidelines: Annotated[Path | None, typer.Option(help="A Markdown file.")] = None,
    criterion: Annotated[list[str] | None, typer.Option(help="For ratings; may be repeated.")] = None,
    scale: Annotated[int, typer.Option(help="For ratings: 5 or 10.")] = 5,
    overlap_votes: Annotated[int, typer.Option(min=1)] = 1,
    overlap_share: Share = 0.0,
    gold_share: Annotated[float, typer.Option(min=0.0, max=0.5)] = 0.1,
    lease_seconds: Annotated[int, typer.Option(min=1)] = 1800,
    chat: Annotated[str, typer.Option(help="FIRST,SECOND policies, in place of a file.")] = "",
    count: Annotated[int, typer.Option(min=1, help="Conversations, with --chat.")] = 100,
    database: Database = str(DATABASE),
) -> None:
    """Make a project and fill its queue."""
    from feedback.loading import chat_items, items_of_file, make_project
    from feedback.projects import create_project

    project = make_project(
        {
            "id": project_id,
            "name": name or project_id,
            "kind": kind,
            "guidelines": guidelines.read_text("utf-8") if guidelines else "",
            "criteria": tuple(criterion or ()),
            "scale": scale,
            "overlap_votes": overlap_votes,
            "overlap_share": overlap_share,
            "gold_share": gold_share,
            "lease_seconds": lease_seconds,
        }
    )
    if chat:
        first, _, second = chat.partition(",")
        rows = chat_items(project, (first, second), count)
    elif file is None:
        raise InputError("--file is needed (or --chat FIRST,SECOND for a chat)")
    else:
        rows = items_of_file(file, project)
    number = create_project(_open(database), "system", project, rows)
    typer.echo(f"project {project.id}: {number} items")


@app.command("add-annotator")
def add_annotator_command(
    name: str,
    role: Role = Role.ANNOTATOR,
    password: Annotated[
        bool, typer.Option("--password", help="Ask for a password; otherwise a token is made and printed.")
    ] = False,
    database: Database = str(DATABASE),
) -> None:
    """Make an account."""
    from pydantic import ValidationError

    from feedback.accounts import add_annotator
    from feedback.loading import explain

    wanted = typer.prompt("password", hide_input=True, confirmation_prompt=True) if password else None
    try:
        person, secret = add_annotator(_open(database), "system", name, role, wanted)
    except ValidationError as error:
        raise InputError(explain(error)) from None
    typer.echo(f"{person.name} ({person.role})" + ("" if password else f"  token: {secret}"))


@app.command("import")
def import_command(
    project_id: Annotated[str, typer.Argument(metavar="PROJECT")],
    file: Path,
    form: Annotated[
        Form, typer.Option("--format", help="items: rows to vote on, without votes.")
    ] = Form.ITEMS,
    database: Database = str(DATABASE),
) -> None:
    """Put rows, or what another annotation system exported with its votes, into a project."""
    from feedback.loading import add_imported
    from feedback.projects import get_project

    store = _open(database)
    with store.read() as connection:
        project = get_project(connection, project_id)
    found = _read(file, form, project, store.clock())
    number, votes = add_imported(store, "system", project, found)
    typer.echo(f"project {project_id}: {number} items and {votes} votes more")
    for reason, count in found.left_out.items():
        typer.echo(f"left out: {count} x {reason}")


@app.command("export")
def export_command(
    project_id: Annotated[str, typer.Argument(metavar="PROJECT")],
    file: Annotated[Path, typer.Argument(help="Is replaced, whole.")],
    form: Annotated[
        Export,
        typer.Option(
            "--format",
            help="records: everything, for `python -m feedback.snapshot` too. rows: what training takes.",
        ),
    ] = Export.RECORDS,
    ties: Annotated[
        Ties, typer.Option(help="Of rows: a tie as a row of its own, no row, or soft.")
    ] = Ties.KEEP,
    database: Database = str(DATABASE),
) -> None:
    """Write a project with its votes to a file."""
    from feedback.files import write_whole
    from feedback.gathering import gather
    from feedback.records import EventType
    from feedback.rows import RowRules

    store = _open(database)
    found = gather(store, project_id)
    text = text_of(found, form, RowRules.model_validate({"ties": ties.value}))
    write_whole(file, text)
    payload = {"project": project_id, "votes": len(found.votes), "to": str(file)}
    store.log("system", EventType.EXPORTED, payload)
    rows = f"{text.count(chr(10))} rows of " if form in (Export.ROWS, Export.TRL) else ""
    typer.echo(f"{file}: {rows}{len(found.items)} items, {len(found.votes)} votes")


@app.command()
def erase(
    name: str,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    database: Database = str(DATABASE),
) -> None:
    """Delete a person's data for good: account, secret, votes and texts, from the log too."""
    from feedback.accounts import erase_account, find_by_name

    store = _open(database)
    person = find_by_name(store, name)
    if person is None:
        raise InputError(f"there is nobody called {name!r}")
    if not yes:
        typer.confirm(f"delete all data of {name!r}, who is {person.role}? It cannot be undone", abort=True)
    entries = erase_account(store, "system", person.id, "asked for")
    typer.echo(
        f"{name}: deleted; {entries} entries of the log were emptied. "
        "Not reached from here: exports, snapshots, models and backups made before."
    )


@app.command()
def status(database: Database = str(DATABASE)) -> None:
    """How far each project is."""
    from feedback.gathering import queue_state
    from feedback.projects import list_projects

    store = _open(database)
    for project in list_projects(store):
        state = queue_state(store, project.id)
        typer.echo(
            f"{project.id}  {project.kind}  votes {state.votes_given} of {state.votes_needed}  "
            f"items {state.num_complete} of {state.num_items}  gold {state.num_gold}  "
            f"flagged {state.num_flagged}  in hands {state.num_leased}"
        )


@app.command()
def rebuild(database: Database = str(DATABASE)) -> None:
    """Make every view again from the event log."""
    typer.echo(f"{_open(database).rebuild()} events")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_open_doors(store: Store, host: str, no_login: bool) -> None:
    """Raises InputError when other machines could come in without an account."""
    from feedback.accounts import count_managers

    if is_loopback(host):
        return
    if no_login:
        raise InputError(f"--no-login listens on loopback alone, not on {host}")
    if count_managers(store) == 0:
        raise InputError(
            f"listening on {host} needs accounts: rlhf feedback add-annotator NAME --role manager"
        )


def _local_manager(store: Store) -> Annotator:
    from feedback.accounts import add_annotator, find_by_name

    return find_by_name(store, "local") or add_annotator(store, "system", "local", Role.MANAGER)[0]


def _make_first_manager(store: Store) -> None:
    """Where nobody could come in, make a manager whose token lies in a file that its owner alone reads."""
    from feedback.accounts import add_annotator, count_managers

    if count_managers(store):
        return
    _, secret = add_annotator(store, "system", FIRST_MANAGER, Role.MANAGER)
    path = STATE / TOKEN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")
    typer.echo(f"sign in as {FIRST_MANAGER} with the token in {path}")


def _open(database: str) -> Store:
    from feedback.store import Store

    return Store(database)


def _read(file: Path, form: Form, project: Project, at: datetime) -> Imported:
    """Raises InputError that names file, line, key and rule."""
    from feedback.formats import argilla, label_studio, trl
    from feedback.formats.reading import Imported
    from feedback.loading import items_of_file

    try:
        match form:
            case Form.LABEL_STUDIO:
                return label_studio.read_annotations(file, project)
            case Form.ARGILLA:
                return argilla.read_records(file, project, at)
            case Form.TRL:
                return trl.read_rows(file, project)
        return Imported(items=items_of_file(file, project))
    except ValueError as error:
        raise InputError(str(error)) from None


def _name_and_target(text: str) -> tuple[str, str]:
    name, separator, target = text.partition("=")
    if not name or not separator or not target:
        raise InputError(f"--policy {text!r}: NAME=TARGET was expected")
    return name, target


def main() -> None:
    """Run a command; an expected failure ends with one message."""
    try:
        app(prog_name="rlhf feedback")
    except FeedbackError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
