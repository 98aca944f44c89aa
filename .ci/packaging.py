"""Build the wheel, install it elsewhere, import every module of it, look for its data.

The installation is imported beside the environment's libraries and without the checkout: in
editable mode a forgotten subpackage or data file would not be missed.
"""

import pkgutil
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGES = ("sae_jax", "extract", "analysis", "experiments")
DATA = ("analysis/data", "analysis/browser/static", "analysis/browser/templates")
IMPORT_ALL = """
import importlib, sys
site, libraries, *names = sys.argv[1:]
sys.path[:] = [site, *sys.path, libraries]
for name in names:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Peers of the benchmarks are written for libraries of another environment.
        peer = name.startswith("experiments.benchmarks.peers.")
        if not peer or error.name.split(".")[0] in names:
            raise
        continue
    assert module.__file__.startswith(site), f"{name} comes from {module.__file__}"
print(f"{len(names)} modules import from the installed wheel")
"""


def main() -> None:
    """Exits with an error at the first thing that is missing."""
    with tempfile.TemporaryDirectory() as folder:
        wheels, site = Path(folder) / "wheels", Path(folder) / "site"
        shutil.rmtree(CHECKOUT / "build", ignore_errors=True)  # or modules deleted since return
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
        subprocess.run([*pip, *build, str(CHECKOUT)], check=True)
        [wheel] = wheels.glob("*.whl")
        install = ["install", "--no-deps", "--target", str(site), str(wheel)]
        subprocess.run([*pip, *install], check=True)

        strangers = {path.name for path in site.iterdir() if path.is_dir()} - {*PACKAGES, "bin"}
        strangers = {name for name in strangers if not name.endswith(".dist-info")}
        assert not strangers, f"the wheel installs {strangers}"
        data = [path for name in DATA for path in (CHECKOUT / name).iterdir() if path.is_file()]
        names = [path.relative_to(CHECKOUT) for path in data]
        missing = [str(name) for name in names if not (site / name).is_file()]
        assert not missing, f"the wheel lacks {missing}"
        found = {m.name for m in pkgutil.walk_packages([str(site)]) if m.name in PACKAGES}
        assert found == set(PACKAGES), f"the wheel lacks {set(PACKAGES) - found}"
        here = _modules(CHECKOUT)
        assert _modules(site) == here, f"the wheel lacks {here - _modules(site)}"
        # -S: no .pth file is read, so the editable installation stays out of the way.
        command = [sys.executable, "-I", "-S", "-c", IMPORT_ALL, str(site)]
        libraries = sysconfig.get_path("purelib")
        subprocess.run([*command, libraries, *sorted(here)], check=True, cwd=folder)


def _modules(root: Path) -> set[str]:
    files = [file for package in PACKAGES for file in (root / package).rglob("*.py")]
    names = {".".join(file.relative_to(root).with_suffix("").parts) for file in files}
    return {name.removesuffix(".__init__") for name in names}


if __name__ == "__main__":
    main()
