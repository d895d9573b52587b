"""Put the DeepSpeed configs, which a clone has beside the package, into the installed package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Builds the package and copies the configs into it, where ``--ds_config zero3`` looks for them."""

    def run(self) -> None:
        """Build, then copy; an editable install finds those of the clone."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "goat_ds", "ds_configs")
            self.mkpath(str(target))
            for config in sorted(Path("ds_configs").glob("*.json")):
                self.copy_file(str(config), str(target))


setup(cmdclass={"build_py": BuildWithConfigs})
