"""Write the site of a run or deployment: a copy of its web deployment, or one made from its ONNX.

Every site has the files of the target ``web``, and the seal of a deployment.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sqft_export.errors import UserError
from sqft_export.inference.locate import Deployment, deployments_of_run, is_model
from sqft_export.inference.templates import read_chat_template, read_special_tokens
from sqft_export.packed.folders import copy_deployment, packed_file
from sqft_export.packed.seal import PROVENANCE, check_seal, read_seal, write_seal
from sqft_export.probes.document import PROBE
from sqft_export.recipe.schema import Recipe
from sqft_export.report.document import REPORT, read_report
from sqft_export.report.runs import latest_report
from sqft_export.targets.folder import kind_of
from sqft_export.targets.web import convert_onnx
from sqft_export.web.static_page import PageSettings, add_library, settings_of_task, write_page

SITE_SOURCES = ("web", "onnx")  # kinds of deployments that a site is made from, the best one first


@dataclass(frozen=True)
class Site:
    """A written site.

    download_bytes: files that a browser downloads before the first answer, without the library.
    """

    folder: Path
    deployment: Deployment
    download_bytes: int


def find_source(folder: Path) -> Deployment:
    """Return the web or ONNX deployment in a folder, or that of a run.

    :raises UserError: if it is missing or packed.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if not is_model(folder):
        return _source_of_run(folder)
    kind = kind_of(folder)
    if kind not in SITE_SOURCES:
        allowed = " or ".join(SITE_SOURCES)
        raise UserError(f"{folder}: found a deployment for {kind}; a site needs one for {allowed}")
    if packed_file(folder) is not None:
        raise UserError(f"{folder}: is packed; first: sqft-export unpack {folder} <folder>")
    return Deployment(kind, folder)


def _source_of_run(run: Path) -> Deployment:
    plain = [one for one in deployments_of_run(run) if packed_file(one.path) is None]
    for kind in SITE_SOURCES:
        for one in plain:
            if kind_of(one.path) == kind:
                return one
    raise UserError(
        f"{run}: has no web and no ONNX deployment; add web to export.targets and run it again"
    )


def write_site(
    deployment: Deployment,
    folder: Path,
    title: str | None = None,
    bundle: bool = False,
    example: str | None = None,
) -> Site:
    """Write a site; it appears under its name only when it is complete.

    :param title: heading of the page; None: that of the deployment, or its folder's name.
    :param bundle: write the library into the site; else the page loads it from a CDN.
    :param example: text in the page's input field; None: that of the deployment, or the first test
        prompt of the run, if its task is without a chat template.
    :raises UserError: if the folder exists, or the deployment lacks a file.
    :raises DamagedError: if the deployment differs from its seal.
    """
    is_page = kind_of(deployment.path) == "web"
    check_seal(deployment.path, whole=True)
    left_out, place = _left_out(deployment.path, is_page), folder.resolve()
    with copy_deployment(deployment.path, place, left_out) as partial:
        if not is_page:
            convert_onnx(deployment.path, partial)
        made = PageSettings.read(partial) if is_page else _settings_of_run(deployment.path)
        settings = replace(
            made,
            title=made.title if title is None else title,
            example=made.example if example is None else example,
        )
        settings = add_library(partial, settings) if bundle else settings
        write_page(partial, settings)
        _seal_as(deployment.path, partial)
    model = [file for file in (folder / "onnx").iterdir() if file.is_file()]
    return Site(folder, deployment, sum(file.stat().st_size for file in model))


@contextmanager
def page_folder(folder: Path) -> Iterator[Path]:
    """Yield the folder of a page: a web deployment or site itself, or a temporary site."""
    found = find_source(folder)
    if kind_of(found.path) == "web":
        yield found.path
        return
    with tempfile.TemporaryDirectory(prefix="sqft-web-") as scratch:
        yield write_site(found, Path(scratch) / "site").folder


def _left_out(deployment: Path, is_page: bool) -> list[Path]:
    """Return the files of a deployment that its site does not take over."""
    files = [file for file in deployment.rglob("*") if file.is_file()]
    kept = None if is_page else {PROBE}
    return [f for f in files if f.name == PROVENANCE or (kept is not None and f.name not in kept)]


def _seal_as(deployment: Path, site: Path) -> None:
    """Seal a site with the origin of its deployment; a deployment without a seal gives none."""
    origin: Mapping[str, object] | None = read_seal(deployment)
    if origin is not None:
        write_seal(site, {k: v for k, v in origin.items() if k not in ("files", "seal")})


def _settings_of_run(deployment: Path) -> PageSettings:
    """Return heading, first prompt and stop texts of the run that an ONNX deployment is from."""
    report = latest_report(deployment.resolve().parent.parent)
    if report is None:
        chat = read_chat_template(deployment) is not None
        return PageSettings(deployment.resolve().name, "", (), chat)
    found = read_report(report / REPORT)
    recipe = Recipe.model_validate(found.recipe)
    made = settings_of_task(deployment, recipe.name, recipe.task, "")
    if made.chat or not found.samples:
        return made
    start = read_special_tokens(deployment).get("bos_token", "")  # the tokenizer adds it again
    return replace(made, example=found.samples[0].prompt.removeprefix(start))
