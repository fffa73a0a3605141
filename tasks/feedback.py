"""People's votes from a flow: put items before them, and write down what they said.

The store is the one of `rlhf feedback serve`; a flow only adds to it and reads from it, so a retry does no
harm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from rlhf_core.errors import InputError

RETRIES, RETRY_SECONDS = 3, 10  # a store that others write to may be busy


@task(name="ask people", retries=RETRIES, retry_delay_seconds=RETRY_SECONDS)
def ask_people(database: str, project: dict[str, Any], rows: Path) -> int:
    """Put the items of a JSON lines file into a project's queue; the project is made when it is not there.

    `project` has the keys of `feedback.records.Project`; one that is there stays as it is, and so do items
    that are in its queue. Returns how many were new. Raises InputError for a project or a row that is wrong.
    """
    from feedback.errors import InputError as FeedbackInputError
    from feedback.formats.reading import Imported
    from feedback.loading import add_imported, items_of_file, make_project
    from feedback.projects import create_project, list_projects
    from feedback.store import Store

    store = Store(database)
    try:
        wanted = make_project(project)
        there = {one.id: one for one in list_projects(store)}.get(wanted.id)
        items = items_of_file(rows, there or wanted)
        if there is None:
            return create_project(store, "system", wanted, items)
        return add_imported(store, "system", there, Imported(items=items))[0]
    except FeedbackInputError as error:
        raise InputError(str(error)) from None
    finally:
        store.close()


@task(name="collect votes", retries=RETRIES, retry_delay_seconds=RETRY_SECONDS)
def collect_votes(database: str, project_id: str, file: Path) -> int:
    """Write all records of a project to `file`, whole; see `feedback.snapshot` for what is made of it.

    Returns how many votes stand. Raises InputError for a project that is not there.
    """
    from feedback.errors import InputError as FeedbackInputError
    from feedback.files import write_whole
    from feedback.formats.jsonl import write_collection
    from feedback.gathering import gather
    from feedback.store import Store

    store = Store(database)
    try:
        found = gather(store, project_id)
    except FeedbackInputError as error:
        raise InputError(str(error)) from None
    finally:
        store.close()
    write_whole(file, write_collection(found))
    return len(found.votes)
