"""Leave out C modules and compiled libraries if SQFT_PURE is set; the wheel is py3-none-any."""

import os

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py


class PureDistribution(Distribution):
    """A distribution without C modules."""

    def has_ext_modules(self) -> bool:
        """Return whether C modules are built: never."""
        return False


class PureBuild(build_py):
    """Copies the files of the package without compiled libraries."""

    def find_data_files(self, package: str, src_dir: str) -> list[str]:
        """Return the data files of a package."""
        found = super().find_data_files(package, src_dir)
        return [file for file in found if not file.endswith(".so")]


if os.environ.get("SQFT_PURE"):
    setup(distclass=PureDistribution, cmdclass={"build_py": PureBuild})
else:
    setup()
