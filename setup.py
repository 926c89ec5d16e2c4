"""What pyproject.toml cannot say: a wheel carries the notebooks and the data inside of the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithNotebooks(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # an editable install reads them where they are
            for name in ("notebooks", "data"):
                target = Path(self.build_lib) / "pftools" / "_shipped" / name
                shutil.copytree(
                    name, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "__pycache__")
                )


setup(cmdclass={"build_py": BuildWithNotebooks})
