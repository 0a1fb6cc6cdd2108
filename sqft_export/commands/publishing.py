"""``push``: publish a deployment on the Hugging Face hub."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def push_command(
    folder: Annotated[
        Path,
        typer.Argument(help="deployment of a run; or a run, which stands for its best deployment"),
    ],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub", metavar="NAME")],
    public: Annotated[
        bool, typer.Option("--public", help="create a public repository; default: private")
    ] = False,
    card: Annotated[
        bool, typer.Option("--card", help="print the model card and send nothing")
    ] = False,
) -> None:
    """Upload a deployment to the Hugging Face hub with a full model card.

    Example: sqft-export push runs/SmolLM2-135M-Instruct me/my-model
    """
    from sqft_export.inference.publish import check_repository, prepare, publish
    from sqft_export.packed.usage import CARD

    check_repository(repository)
    publication = prepare(folder)
    if card:
        print(publication.texts[CARD])
        return
    found = publication.deployment
    print(f"{found.name}: {found.path}, {len(publication.paths) + 2} files", file=sys.stderr)
    print(publish(publication, repository, private=not public))


def register(app: typer.Typer) -> None:
    """Add the command of this module to the command line."""
    app.command("push")(push_command)
