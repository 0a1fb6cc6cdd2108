"""``chat`` and ``generate``: talk to a deployment in the terminal."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqft_export.commands.options import KernelsOption
from sqft_export.errors import UserError

if TYPE_CHECKING:
    from sqft_export.inference.text import AnswerSpeed, Prompt, TextSession

MAX_TOKENS_OPTION = 2**20
_Talker = Annotated[
    Path,
    typer.Argument(
        help="run folder, which stands for its best deployment; or an OpenVINO, ONNX, GGUF or "
        "merged folder",
        metavar="FOLDER",
    ),
]
_PromptText = Annotated[str | None, typer.Option("--prompt", "-p", help="use this prompt and exit")]
_NewTokenLimit = Annotated[
    int, typer.Option(min=1, max=MAX_TOKENS_OPTION, help="largest number of tokens per answer")
]
_StopTexts = Annotated[
    list[str] | None, typer.Option("--stop", help="text that ends an answer; may be repeated")
]
_ComputeThreads = Annotated[
    int | None,
    typer.Option(min=1, max=4096, help="compute threads; default: the runtime's choice"),
]
_DeviceName = Annotated[str, typer.Option(help="a device that `list targets` prints, such as cpu")]
NEW_CONVERSATION = "/new"
INTRODUCTION = f"type a message; {NEW_CONVERSATION} starts a new conversation, Ctrl-D ends"


def chat_command(
    folder: _Talker,
    prompt: _PromptText = None,
    system: Annotated[
        str | None, typer.Option(help="system message at the start of the conversation")
    ] = None,
    max_new_tokens: _NewTokenLimit = 512,
    stop: _StopTexts = None,
    threads: _ComputeThreads = None,
    device: _DeviceName = "cpu",
    execution: KernelsOption = None,
) -> None:
    """Talk to a deployment in its own runtime, with its chat template.

    Without -p it reads one message per line and keeps the conversation.

    Example: sqft-export chat runs/SmolLM2-135M-Instruct -p "What is a llama?"
    """
    session = _open(folder, device, threads, execution)
    if session.template is None:
        _note(
            f"{session.folder} has no chat template: every message is continued as plain text, "
            "without the messages before it; its README.md shows the prompt format"
        )
        if system is not None:
            raise UserError("--system: needs a chat template, which this deployment does not have")
    conversation: list[dict[str, str]] = []
    for message in [prompt] if prompt is not None else _messages():
        if message == NEW_CONVERSATION:
            conversation = []
            continue
        if not conversation and system is not None:
            conversation.append({"role": "system", "content": system})
        conversation.append({"role": "user", "content": message})
        if session.template is not None:
            _leave_out_oldest(session, conversation, max_new_tokens)
        asked: Prompt = message if session.template is None else conversation
        answer = _print_answer(session, asked, max_new_tokens, stop or ())
        conversation.append({"role": "assistant", "content": answer.strip()})


def _leave_out_oldest(
    session: "TextSession", conversation: list[dict[str, str]], limit: int
) -> None:
    """Delete the oldest exchanges of a conversation that would leave no room for an answer.

    A system message stays, and so does the last message.

    :param limit: largest number of tokens of the answer; a quarter of the context is enough.
    """
    first = int(conversation[0]["role"] == "system")
    room, before = min(limit, session.context // 4), len(conversation)
    while len(conversation) > first + 2:
        if len(session.encode(conversation)) + room <= session.context:
            break
        del conversation[first : first + 2]
    if left_out := before - len(conversation):
        _note(f"the context of {session.context} tokens is full: {left_out} messages are left out")


def generate_command(
    folder: _Talker,
    prompt: _PromptText = None,
    max_new_tokens: _NewTokenLimit = 512,
    stop: _StopTexts = None,
    threads: _ComputeThreads = None,
    device: _DeviceName = "cpu",
    execution: KernelsOption = None,
) -> None:
    """Continue a plain text with a deployment, without a chat template.

    Without -p it reads the text from standard input.

    Example: sqft-export generate runs/tiny -p "Question: What is 2 plus 3? Answer:"
    """
    session = _open(folder, device, threads, execution)
    text = prompt if prompt is not None else sys.stdin.read()
    _print_answer(session, text, max_new_tokens, stop or ())


def _open(folder: Path, device: str, threads: int | None, execution: str | None) -> "TextSession":
    """Load the deployment that a folder stands for, and name it and our kernels on stderr."""
    from sqft_export.inference.locate import find_deployment
    from sqft_export.inference.text import open_deployment
    from sqft_export.targets.execution import kernels_title, usable_execution

    found = find_deployment(folder)
    if found.path != folder:
        speed = found.tokens_per_second
        which, measured = "a verified deployment", ""
        if found.row is not None:
            which = "the best deployment"
            measured = f", {speed:.0f} tokens per second in the report" if speed else ""
        _note(f"{found.name}, {which} of {folder}{measured}: {found.path}")
    kernels = usable_execution(found.path, execution or found.execution, device)
    session = open_deployment(found.path, device, threads, kernels)
    if session.runtime == "gguf" and kernels != "stock":
        _note(kernels_title(session.runtime, kernels))
    if session.session.placement:
        _note(session.session.placement)
    return session


def _messages() -> Iterator[str]:
    """Yield the lines that the user types, or those of standard input, without empty ones."""
    typed = sys.stdin.isatty()
    if typed:
        _note(INTRODUCTION)
    lines: Iterable[str] = _typed_lines() if typed else sys.stdin
    for line in lines:
        if line.strip():
            yield line.strip()


def _typed_lines() -> Iterator[str]:
    while True:
        try:
            yield input("> ")
        except EOFError:
            return


def _print_answer(session: "TextSession", prompt: Any, limit: int, stop: Iterable[str]) -> str:
    """Print an answer while it is computed, and its speed on stderr; return its text."""
    pieces = []
    for piece in session.stream(prompt, limit, tuple(stop)):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    _note(_speed_text(session.speed))
    return "".join(pieces)


def _speed_text(speed: "AnswerSpeed") -> str:
    rate = speed.tokens_per_second
    text = f"{speed.new_tokens} tokens" + (f", {rate:.1f} tokens per second" if rate else "")
    return f"{text}; {speed.prompt_tokens} prompt tokens in {speed.prefill_seconds:.2f} s"


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def register(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("chat")(chat_command)
    app.command("generate")(generate_command)
