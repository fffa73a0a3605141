"""`rlhf serve`: the champion behind OpenAI's chat completions, and a page to talk to it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from feedback.cli import DATABASE, STATE, Database, is_loopback
from feedback.errors import FeedbackError
from rlhf_core.errors import InputError, RLHFError
from rlhf_core.layout import Layout

if TYPE_CHECKING:
    from rlhf_core.config import RunConfig
    from serving.fleet import Fleet
    from serving.models import Capacity
    from serving.registry import DirectorySource, RegistrySource
    from serving.service import Recorder, Service
    from serving.watch import Watcher

KEY_VARIABLE, LEAST_KEY = "RLHF_SERVE_KEY", 16
KEY_FILE = STATE / "users.key"
DEFAULT_NAME = "rlhf-policy"
SHUTDOWN_SECONDS = 5
log = logging.getLogger("serving")  # run as a module, this one is named __main__

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False
)


@app.command()
def serve(
    model: Annotated[
        str, typer.Option(help="One model that stays: a stage's name, a directory or models:/NAME/VERSION.")
    ] = "",
    challenger: Annotated[
        str, typer.Option(help="A second version for a share of conversations: an alias or a version.")
    ] = "",
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="The challenger's share.")] = 0.1,
    log_with_consent: Annotated[
        bool, typer.Option("--log-with-consent", help="Keep answers of users who consent, for feedback.")
    ] = False,
    database: Database = str(DATABASE),
    host: Annotated[
        str, typer.Option(help=f"Where to listen; beyond loopback {KEY_VARIABLE} must be set.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8700,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="A name under which the server may be asked; may be repeated.")
    ] = None,
    interval: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks at the registry's aliases.")
    ] = 10.0,
    slots: Annotated[int, typer.Option(min=1, max=64, help="Answers written at once, by each model.")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are refused (429).")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that may be asked for.")] = 1024,
    context: Annotated[
        int, typer.Option(min=0, help="Tokens of a prompt with its answer; 0: what the model can.")
    ] = 2048,
    max_body: Annotated[int, typer.Option(min=1024, help="Bytes of a request.")] = 2**20,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, help="How long answers may go on after SIGTERM or Ctrl-C.")
    ] = 60.0,
) -> None:
    """Serve the registry's champion, with streaming; a new champion takes over without a restart."""
    from serving.models import Capacity
    from serving.service import Limits, Service

    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    logging.getLogger("serving").setLevel(logging.INFO)
    key = _key(host)
    hosts = ("127.0.0.1", "localhost", "::1", "[::1]") if is_loopback(host) else ()
    limits = Limits(max_tokens, max_body, slots, key, (*hosts, *(allowed_host or ([] if hosts else ["*"]))))
    recorder = _recorder(database) if log_with_consent else None
    source = _source(model, challenger, Capacity(slots, queue, context))
    fleet, watcher = _start(source, share if challenger else 0.0, interval)
    try:
        _run(Service(fleet, watcher, limits, recorder), host, port, drain_seconds)
    finally:
        watcher.stop()
        fleet.close()


def _start(source: RegistrySource | DirectorySource, share: float, interval: float) -> tuple[Fleet, Watcher]:
    from serving.fleet import Fleet
    from serving.watch import Watcher

    fleet = Fleet(source.name, share)
    watcher = Watcher(fleet, source, interval)
    try:
        watcher.start()
    except BaseException:
        fleet.close()
        raise
    return fleet, watcher


def _key(host: str) -> str:
    """Raises InputError when other machines could come in without a key."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key and is_loopback(host):
        return ""
    if len(key) < LEAST_KEY:
        raise InputError(
            f"{KEY_VARIABLE}: listening on {host} needs a key of {LEAST_KEY} characters or more, found "
            f"{len(key)}"
        )
    return key


def _recorder(database: str) -> Recorder:
    from feedback.production import open_production, read_key
    from feedback.store import Store
    from serving.service import Recorder

    store = Store(database)
    open_production(store)
    return Recorder(store, read_key(KEY_FILE))


def _source(model: str, challenger: str, capacity: Capacity) -> RegistrySource | DirectorySource:
    """Raises InputError for a model that is not there, or options that do not go together."""
    from rlhf_core.commands.chat import find_model
    from serving.registry import DirectorySource, RegistrySource

    layout = Layout.here()
    run, name = _settings(layout)
    if not model:
        return RegistrySource(layout.root, name, challenger, run, capacity)
    if challenger:
        raise InputError(f"--model {model} stays alone: --challenger goes with the registry's champion")
    directory = find_model(model, layout)
    plain = model.removeprefix("models:/").partition("@")[0].partition("/")[0]
    return DirectorySource(
        directory, plain if model.startswith("models:/") else directory.name, run, capacity
    )


def _settings(layout: Layout) -> tuple[RunConfig, str]:
    """Section `run` and the registered model's name; a directory can be served from anywhere."""
    from rlhf_core.config import RunConfig, load_params

    if not layout.params.is_file():
        return RunConfig.alone(), DEFAULT_NAME
    params = load_params(layout.params)
    return params.run, params.flow.registered_model


def _run(service: Service, host: str, port: int, drain_seconds: float) -> None:
    """Serve until a signal; then end what is running, at most for `drain_seconds`."""
    import uvicorn

    from serving.app import create_app

    class DrainingServer(uvicorn.Server):
        """Keeps its socket open while it drains, so that new requests are told, not cut off."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if service.fleet.draining:  # a second signal: now
                self.should_exit = self.force_exit = True
                return
            service.fleet.draining = True
            threading.Thread(target=self._drain, name="drain", daemon=True).start()

        def _drain(self) -> None:
            log.info("draining: %d requests in flight", service.fleet.in_flight)
            if not service.fleet.drain(drain_seconds):
                log.warning("%d requests were not answered in time", service.fleet.in_flight)
            service.fleet.close()
            self.should_exit = True

    server = DrainingServer(
        uvicorn.Config(
            create_app(service),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    )
    place = f"[{host}]" if ":" in host else host
    print(f"Serve     http://{place}:{port}  (page at /, API at /v1)", flush=True)
    server.run()


def main() -> None:
    """Run the command; an expected failure ends with one message."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while models load; the server has its own
    try:
        app(prog_name="rlhf serve")
    except (RLHFError, FeedbackError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except OSError as error:
        where = f"{Path(error.filename)}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
