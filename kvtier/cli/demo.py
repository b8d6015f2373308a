"""`kvtier demo`: two engines share one cache over a restart of everything, and what that saved.

The story: conversations over one long system prompt move between two engine processes; the daemon
stops and starts again; an engine is replaced by a new process. Each request is also computed
without kvtier, in the same process, and must be the same. Does not: download anything, or leave
a process or file behind, however it ends.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier.cli.app import fail, print_json
from kvtier.cli.demo_parts import Daemon, Engine, make_model
from kvtier.testing.models import random_tokens
from kvtier.units import GIB, MIB, align_up

if TYPE_CHECKING:
    from rich.console import Console

NEEDED = ("torch", "transformers", "safetensors")
NEW_TOKENS = 12
TURN_TOKENS = (61, 38, 83, 47)  # what a user says, in tokens; no multiple of a block
DIRECTORY_BYTES_MAX = 60  # a socket's path has room for 107
DRAM_BYTES_MIN, DRAM_BYTES_MAX = 384 * MIB, 8 * GIB
SSD_BYTES_MIN = GIB


@dataclass
class Conversation:
    """One user's conversation: all tokens so far, the shared system prompt first."""

    name: str
    seed: int
    vocabulary: int
    tokens: list[int]
    turn: int = 0

    def say(self) -> list[int]:
        """Adds what the user says next; returns the prompt."""
        count = TURN_TOKENS[self.turn % len(TURN_TOKENS)]
        self.turn += 1
        seed = self.seed * 1000 + self.turn
        self.tokens += random_tokens(count, seed=seed, vocabulary=self.vocabulary)
        return self.tokens

    def hear(self, answer: list[int]) -> None:
        self.tokens = self.tokens + answer


@dataclass
class Story:
    """The demo as it runs: its processes, and its requests so far."""

    daemon: Daemon
    engines: list[Engine]
    tell: Callable[[str], None]
    rows: list[dict[str, Any]] = field(default_factory=list)
    after_restart: bool = False

    def ask(self, engine: Engine, conversation: Conversation, *, note: str = "") -> None:
        """One turn of a conversation on one engine."""
        self.tell(f"{conversation.name}, turn {conversation.turn + 1}, on {engine.name}")
        answer = engine.ask(conversation.say(), NEW_TOKENS)
        conversation.hear(answer.pop("answer"))
        self.rows.append(
            {
                "conversation": conversation.name,
                "turn": conversation.turn,
                "engine": engine.name,
                "note": note,
                "after_restart": self.after_restart,
                **answer,
            }
        )

    def restart_daemon(self) -> None:
        self.tell("stopping the daemon")
        stopped_s = self.daemon.stop()
        self.tell(f"stopped in {stopped_s:.1f} s; starting it again")
        started_s = self.daemon.start()
        self.tell(f"serving again after {started_s:.1f} s")
        self.after_restart = True


def run_demo(model: Path | None, *, keep: bool, as_json: bool) -> int:
    """Runs it and prints it; returns 0 when every promise held, else 1."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        fail(f"the demo needs {' and '.join(missing)}: pip install 'kvtier[demo]'", status=1)
    if model is not None and not (model / "config.json").is_file():
        fail(f"{model} is not a Hugging Face model directory (no config.json)", status=2)
    from kvtier.cli import render

    progress = render.console(stderr=True)
    with _directory(keep, progress) as directory, _terminated_as_interrupted():
        made, story, stat = _play(directory, model, _teller(progress))
    problems = judge(story.rows)
    if as_json:
        described = {"model": made["description"], "problems": problems}
        print_json({"ok": not problems, "requests": story.rows, "stat": stat, **described})
    else:
        _show(made, story.rows, stat, problems)
    return 1 if problems else 0


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """What did not hold; empty when the demo shows what it is for."""
    problems = []
    for number, row in enumerate(rows, 1):
        if not row["identical"]:
            problems.append(f"request {number}: output differs from plain generate()")
        if row["found_tokens"] and row["ttft_ms"] >= row["ttft_baseline_ms"]:
            problems.append(f"request {number}: a hit, and not faster than computing")
        if row.get("failures"):
            problems.append(f"request {number}: kvtier failed meanwhile: {row['failures']}")
    for after, when in ((False, "before"), (True, "after")):
        if not any(row["found_tokens"] for row in rows if row["after_restart"] is after):
            problems.append(f"nothing was found {when} the restart")
    return problems


def _play(
    directory: Path, model: Path | None, tell: Callable[[str], None]
) -> tuple[dict[str, Any], Story, dict[str, Any]]:
    """The story, and at its end what the daemon says; ends every process it started."""
    with ExitStack() as ends:
        tell(
            "making a model whose prefill takes a second"
            if model is None
            else "measuring the model"
        )
        made = make_model(directory, model)
        dram_bytes, ssd_bytes = _sizes(made)
        daemon = Daemon(directory, dram_bytes=dram_bytes, ssd_bytes=ssd_bytes)
        ends.callback(daemon.close)
        tell(f"{made['description']}, system prompt of {made['prompt_tokens']:,} tokens")
        daemon.start()
        engines = []
        for number in (1, 2):
            engine = Engine(
                f"engine {number}", made["path"], daemon.socket, directory / f"engine{number}.log"
            )
            ends.callback(engine.close)
            engine.start()
            engines.append(engine)
        tell("starting two engines")
        for engine in engines:
            engine.ready()
        story = Story(daemon, engines, tell)
        _converse(story, made)
        from kvtier.cli.plain import plain_stat
        from kvtier.client.admin import AdminClient

        with AdminClient(daemon.admin_socket) as admin:
            stat = plain_stat(admin.stat())
        tell("stopping everything")
    return made, story, stat


def _converse(story: Story, made: dict[str, Any]) -> None:
    """Who asks what, where, and what restarts in between."""
    vocabulary = made["vocabulary"]
    system = random_tokens(made["prompt_tokens"], seed=1, vocabulary=vocabulary)
    ann, bob, cleo = (
        Conversation(name, seed, vocabulary, list(system))
        for seed, name in enumerate(("Ann", "Bob", "Cleo"), 2)
    )
    one, two = story.engines
    story.ask(one, ann, note="first of all")
    story.ask(two, bob, note="engine 1 computed the prompt")
    story.ask(two, ann, note="moved to engine 2")
    story.ask(one, cleo)
    story.restart_daemon()
    story.ask(one, bob, note="daemon restarted")
    story.ask(two, ann, note="daemon restarted")
    story.tell("replacing engine 2 by a new process")
    two.restart()
    story.ask(two, cleo, note="and engine 2 is a new process")
    story.ask(one, ann, note="moved back to engine 1")


def _show(
    made: dict[str, Any], rows: list[dict[str, Any]], stat: dict[str, Any], problems: list[str]
) -> None:
    from kvtier.cli import render

    console = render.console()
    console.print(f"{made['description']}; {made['prompt_tokens']:,} tokens of system prompt.")
    console.print(render.demo_requests(rows))
    console.print(render.stat(stat))
    hits = [row for row in rows if row["found_tokens"]]
    if problems:
        console.print("\n".join(["NOT OK:", *problems]), style="bold red")
    elif hits:
        ratio = sum(r["ttft_baseline_ms"] for r in hits) / sum(r["ttft_ms"] for r in hits)
        console.print(
            f"OK: {len(hits)} of {len(rows)} requests hit, before and after the restart; first "
            f"tokens came {ratio:.1f} times sooner, and every output is the same.",
            style="bold green",
        )


def _sizes(made: dict[str, Any]) -> tuple[int, int]:
    """Bytes of DRAM and SSD for what the conversations need, small where that is little."""
    tokens = made["prompt_tokens"] + 3 * len(TURN_TOKENS) * (max(TURN_TOKENS) + NEW_TOKENS)
    needed = tokens * made["kv_bytes_per_token"]
    dram_bytes = min(max(2 * needed, DRAM_BYTES_MIN), DRAM_BYTES_MAX)
    return align_up(dram_bytes, 2 * MIB), align_up(max(4 * needed, SSD_BYTES_MIN), 2 * MIB)


def _teller(console: Console) -> Callable[[str], None]:
    """Progress for a person at a terminal; nobody else wants it."""
    if not console.is_terminal:
        return lambda _: None
    return lambda sentence: console.print(f"… {sentence}", style="dim")


@contextmanager
def _directory(keep: bool, progress: Console) -> Iterator[Path]:
    """A new directory with a short path, gone afterwards unless it is to be kept."""
    base = tempfile.gettempdir()
    if len(base.encode()) > DIRECTORY_BYTES_MAX:
        base = "/tmp"  # noqa: S108 - made with mkdtemp; sockets need a short path
    directory = Path(tempfile.mkdtemp(prefix="kvtier-", dir=base))
    try:
        yield directory
    finally:
        if keep:
            progress.print(f"kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM and SIGHUP end the demo as Ctrl-C does: with everything cleaned up.

    An exception that meets a finalizer is swallowed there: then the demo ends later, but it ends
    as interrupted.
    """
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
        if interrupted:
            raise KeyboardInterrupt
    finally:
        for number, was in before.items():
            signal.signal(number, was)
