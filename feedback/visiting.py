"""A simulated annotator at the real pages: signs in, reads what is shown, votes, until nothing is left.

It knows what a person at the screen knows: texts by position, and neither the sides nor the policies behind
them. A vote carries the key of its form, so one that is sent again after a lost answer counts once.
"""

from __future__ import annotations

import html.parser
import time
from dataclasses import dataclass, field

import httpx

from feedback.records import Choice, Item, Label, Message, Ranking, Ratings, Record, Response, TaskKind
from feedback.simulate import SimulatedAnnotator

TRIES = 30
SECONDS_BETWEEN_TRIES = 2.0
BLOCKS = ("p", "div", "li", "br", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "tr", "blockquote")
BUSY = (429, 500, 502, 503, 504)


@dataclass
class Page:
    """What a page with an item shows."""

    kind: str = ""
    fields: dict[str, str] = field(default_factory=dict)  # hidden fields of the form of the vote
    prompt: list[tuple[str, str]] = field(default_factory=list)  # role and text
    answers: list[str] = field(default_factory=list)  # by position

    def as_item(self, project: str) -> Item:
        """The item as the annotator sees it: response 0 is the one shown first."""
        return Item(
            id=self.fields["item"],
            project=project,
            kind=TaskKind(self.kind),
            messages=tuple(Message.model_validate({"role": r, "content": t}) for r, t in self.prompt),
            responses=tuple(Response(text=text) for text in self.answers),
        )


class _Reader(html.parser.HTMLParser):
    """Takes a Page out of the markup of feedback/web/templates/annotate.html."""

    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._depth = 0  # of elements inside the prose that is read, 0 outside
        self._place = ""  # whose prose comes next: "answer", or a role of the prompt
        self._in_vote = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        classes = values.get("class", "").split()
        if self._depth and tag not in ("br", "img", "hr"):
            self._depth += 1
        if self._depth and tag in BLOCKS:
            self._append(" ")
        if values.get("id") == "task":
            self.page.kind = values["data-kind"]
        elif tag == "form":
            self._in_vote = values.get("id") == "vote"
        elif tag == "input" and self._in_vote and values.get("type") == "hidden":
            self.page.fields[values["name"]] = values.get("value", "")
        elif "answer" in classes:
            self._place = "answer"
        elif "message" in classes:
            self._place = next((c for c in classes if c in ("user", "assistant", "system")), "")
        elif "prose" in classes and self._place and not self._depth:
            self._depth = 1
            self._begin()

    def handle_endtag(self, tag: str) -> None:
        if self._depth:
            self._depth -= 1
            if not self._depth:
                self._place = ""
        if tag == "form":
            self._in_vote = False

    def handle_data(self, data: str) -> None:
        if self._depth:
            self._append(data)

    def _begin(self) -> None:
        if self._place == "answer":
            self.page.answers.append("")
        else:
            self.page.prompt.append((self._place, ""))

    def _append(self, text: str) -> None:
        if self._place == "answer":
            self.page.answers[-1] += text
        else:
            role, before = self.page.prompt[-1]
            self.page.prompt[-1] = (role, before + text)


def read_page(text: str) -> Page | None:
    """What is to be voted on; None where nothing is left."""
    reader = _Reader()
    reader.feed(text)
    page = reader.page
    if "item" not in page.fields:
        return None
    page.answers = [" ".join(answer.split()) for answer in page.answers]
    page.prompt = [(role, " ".join(said.split())) for role, said in page.prompt]
    return page


def form_of(value: Record, criteria: tuple[str, ...] = ()) -> dict[str, str]:
    """The fields by which a page sends `value`, whose responses are numbered by position."""
    if isinstance(value, Choice):
        if value.choice in ("tie", "bad"):
            return {"choice": value.choice}
        return {"choice": f"{'ab'.index(value.choice)}:{value.strength}"}
    if isinstance(value, Ranking):
        return {f"rank-{position}": str(rank) for position, rank in enumerate(value.ranks)}
    if isinstance(value, Ratings):
        return {f"rating-{number}": str(value.ratings[name]) for number, name in enumerate(criteria)}
    if isinstance(value, Label):
        return {"label": "good" if value.good else "bad"}
    return {"text": value.text}  # type: ignore[attr-defined]


class Visitor:
    """One annotator's browser."""

    def __init__(
        self, url: str, name: str, secret: str, person: SimulatedAnnotator, http: httpx.Client | None = None
    ) -> None:
        """Raises ValueError when name and secret do not fit."""
        self.person = person
        self._http = http or httpx.Client(base_url=url, timeout=60.0)
        answer = self._ask("POST", "/login", data={"name": name, "secret": secret})
        if answer.status_code != 303:
            raise ValueError(f"{name} cannot sign in at {url}: status {answer.status_code}")

    def vote_on_all(self, project: str) -> int:
        """Vote on every item that this annotator is given; how many votes. Raises ValueError when refused."""
        count = 0
        while self.vote_once(project):
            count += 1
        return count

    def vote_once(self, project: str) -> bool:
        """Vote on the next item; False when nothing is left."""
        page = read_page(self._ask("GET", f"/p/{project}").text)
        if page is None:
            return False
        item = page.as_item(project)
        value = self.person.vote(item)
        seconds = {"seconds": str(self.person.seconds_for(item))}
        fields = page.fields | form_of(value, self.person.criteria) | seconds
        answer = self._ask("POST", f"/p/{project}/vote", data=fields, headers={"Accept": "application/json"})
        if answer.status_code != 200:
            raise ValueError(f"vote on {item.id}: status {answer.status_code}: {answer.text[:200]}")
        return True

    def close(self) -> None:
        self._http.close()

    def _ask(self, method: str, path: str, **options) -> httpx.Response:
        """Try again while the service is away or busy; the same form counts once."""
        for number in range(TRIES):
            try:
                answer = self._http.request(method, path, **options)
            except httpx.TransportError:
                if number == TRIES - 1:
                    raise
            else:
                if answer.status_code not in BUSY:
                    return answer
            time.sleep(SECONDS_BETWEEN_TRIES)
        raise ValueError(f"{path}: the service was busy {TRIES} times in a row")
