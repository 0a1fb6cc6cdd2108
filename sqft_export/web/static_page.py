"""Write the static page next to a model folder of Transformers.js.

``settings.json`` has heading, first prompt and stop texts. The page checks the device with the
prompts of the deployment's ``probe.json``.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Self

from sqft_export.data.stops import stop_texts
from sqft_export.errors import UserError
from sqft_export.inference.templates import read_chat_template
from sqft_export.recipe.schema import Chat, Task
from sqft_export.textfiles import read_json
from sqft_export.web.library import CDN_MODULE, LIBRARY_MODULE, fetch_library

PAGE = Path(__file__).parent / "page" / "index.html"
LIBRARY_FOLDER, PAGE_SETTINGS = "library", "settings.json"


@dataclass(frozen=True)
class PageSettings:
    """The content of ``settings.json``.

    title: heading.
    example: text in the input field.
    stop: texts that end an answer.
    chat: a prompt is a message, which the chat template renders.
    template_arguments: variables that the chat template reads.
    library: address of Transformers.js.
    wasm: folder of ONNX Runtime Web; None: its place on the CDN.
    """

    title: str
    example: str
    stop: Sequence[str]
    chat: bool
    template_arguments: Mapping[str, object] = field(default_factory=dict)
    library: str = CDN_MODULE
    wasm: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the settings of a page.

        :raises UserError: if they are missing or have other fields.
        """
        file = folder / PAGE_SETTINGS
        try:
            return cls(**read_json(file))
        except TypeError as error:
            raise UserError(f"{file}: {error}; write the page again") from error


def settings_of_task(folder: Path, title: str, task: Task, example: str) -> PageSettings:
    """Return the settings for a model that was tuned on a task.

    :param folder: the deployment, with its chat template.
    """
    chat = read_chat_template(folder) is not None
    arguments = task.template_arguments if isinstance(task, Chat) else {}
    return PageSettings(title, example, list(stop_texts(task)), chat, arguments)


def write_page(folder: Path, settings: PageSettings) -> None:
    """Write page and settings into a model folder."""
    (folder / PAGE_SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n")
    shutil.copyfile(PAGE, folder / PAGE.name)


def add_library(folder: Path, settings: PageSettings) -> PageSettings:
    """Fetch Transformers.js into a page's folder; return the settings that load it from there."""
    (folder / LIBRARY_FOLDER).mkdir(exist_ok=True)
    fetch_library(folder / LIBRARY_FOLDER)
    place = f"./{LIBRARY_FOLDER}/"
    return replace(settings, library=f"{place}{LIBRARY_MODULE}", wasm=place)
