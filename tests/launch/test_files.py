"""The scripts and the images as files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.launch.conftest import LAUNCH

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [*LAUNCH.glob("*.sh"), *LAUNCH.glob("tests/*.sh"), *LAUNCH.glob("*.sbatch")]
    done = subprocess.run([SHELLCHECK, "-x", *scripts], capture_output=True, text=True, cwd=LAUNCH.parent)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("kind", "extra"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_dockerfiles_copy_existing_files_and_install_known_extras(kind, extra):
    lines = (LAUNCH / f"Dockerfile.{kind}").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            assert all((LAUNCH.parent / name).exists() for name in line.split()[1:-1])
    assert f".[{extra},serve]" in "\n".join(lines)
    known = (LAUNCH.parent / "pyproject.toml").read_text()
    assert f"\n{extra} = [" in known
    assert "\nserve = [" in known
    assert lines[-1] == 'ENTRYPOINT ["mythos"]'


def versions(python, package):
    """The versions of a package that constraints.txt has for a Python."""
    lines = (LAUNCH.parent / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.startswith(f"{package}==")]
    environment = {"python_full_version": f"{python}.0", "python_version": python}
    return {str(line.specifier)[2:] for line in found if line.marker is None or line.marker.evaluate(environment)}


def test_images_have_the_jax_and_the_compiler_that_the_tables_were_made_with():
    """Another Python gets others from constraints.txt."""
    pods = (LAUNCH.parent / "docs" / "pods.md").read_text()
    made_with = set(re.findall(r"with jax ([\d.]*\d), libtpu ([\d.]*\d)", pods))
    pythons = {
        re.findall(r"python:([\d.]+)-slim", (LAUNCH / name).read_text())[0]
        for name in ("Dockerfile.tpu", "Dockerfile.gpu", "skypilot.yaml")
    }
    (python,) = pythons
    assert {(jax, libtpu) for jax in versions(python, "jax") for libtpu in versions(python, "libtpu")} == made_with
