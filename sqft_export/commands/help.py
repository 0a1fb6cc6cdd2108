"""The first page of the command line: the path of a first user, the version, and wrong commands."""

import sys
from typing import Any

import click
import typer
from typer.core import TyperGroup

EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
INTRODUCTION = f"""Compile a language model on your data into a small INT4 model for OpenVINO, ONNX
Runtime and llama.cpp.

Start with a model (its folder, or its name on the Hugging Face hub) and a file of conversations:

    sqft-export run {EXAMPLE} --data chats.jsonl

    sqft-export chat runs/SmolLM2-135M-Instruct

    sqft-export serve runs/SmolLM2-135M-Instruct

A line of chats.jsonl:

{{"messages": [{{"role": "user", "content": "Hi"}}, {{"role": "assistant", "content": "Hello!"}}]}}

`plan` in place of `run` shows time, memory and disk space first. `init` writes the recipe that
`run` uses, to be edited. Without training: run ... --preset int4-untuned.
"""
# Words that people try, and the command that does it.
_UNTUNED = f"sqft-export run {EXAMPLE} --data <file> --preset int4-untuned"
_TUNED = f"sqft-export run {EXAMPLE} --data <file>"
OTHER_WORDS = {
    **dict.fromkeys(("quantize", "quantise", "compress", "ptq", "convert"), _UNTUNED),
    **dict.fromkeys(("train", "tune", "finetune", "fine-tune", "compile", "lora"), _TUNED),
    **dict.fromkeys(("prune", "sparsify"), f"{_TUNED} --preset int4-sparse"),
    **dict.fromkeys(("eval", "evaluate", "score", "measure"), "sqft-export benchmark <folder>"),
    **dict.fromkeys(("infer", "predict", "complete"), "sqft-export generate <folder>"),
    **dict.fromkeys(("server", "deploy"), "sqft-export serve <folder>"),
    **dict.fromkeys(("show", "info"), "sqft-export inspect <folder>"),
    **dict.fromkeys(("check", "certify"), "sqft-export verify <folder>"),
}


class Commands(TyperGroup):
    """The commands; for an unknown one, the message names the command with that purpose."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command; for the word of another tool, an error with ours."""
        if args and args[0] not in self.commands and (ours := OTHER_WORDS.get(args[0].lower())):
            ctx.fail(f"No such command {args[0]!r}. Use: {ours}")
        return super().resolve_command(ctx, args)


def print_version(requested: bool) -> None:
    """Print the version and end, if it was requested."""
    if requested:
        from importlib.metadata import version

        print(f"sqft-export {version('sqft-export')}, Python {sys.version.split()[0]}")
        raise typer.Exit


def version_option() -> Any:
    """Return the option ``--version``."""
    return typer.Option(
        "--version", callback=print_version, is_eager=True, help="show the version and end"
    )
