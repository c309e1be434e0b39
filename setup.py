"""What pyproject.toml cannot say: the released weights go into a built package, as `pixelcnn/weights/`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithWeights(build_py):
    def run(self) -> None:
        if not self.editable_mode:  # a wheel takes all that lies there, also of a build before
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if not self.editable_mode:  # a clone has them beside the code
            names = ("config.json", "model.safetensors", "scores.json", "README.md")
            for file in (path for name in names for path in Path("weights").glob(f"[!.]*/{name}")):  # whole ones
                target = Path(self.build_lib) / "pixelcnn" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)


setup(cmdclass={"build_py": BuildWithWeights})
