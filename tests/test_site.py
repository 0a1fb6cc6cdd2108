"""The documents build into a site without a broken link, and the README's links lead somewhere."""

import os
import re
import subprocess
import sys

from conftest import ROOT

LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def test_the_site_builds_without_a_broken_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path]
    built = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "reference" / "recipe" / "index.html").is_file()


def test_links_between_files_of_the_repository_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("benchmarks/notes/*.md")]
    broken = [
        f"{page.name}: {link}"
        for page in pages
        for link in LINK.findall(page.read_text())
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert not broken
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160
