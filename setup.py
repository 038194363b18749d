"""The packages that pyproject.toml cannot list: all of dskernels, and reference/ as dskernels.reference."""

from setuptools import find_packages, setup

# reference/ stands beside the package, where whoever opens the repository finds it. The link dskernels/reference shows
# it to a checkout that is not installed; source archives and checkouts on Windows have no links, so it is named here.
setup(
    packages=sorted({*find_packages(include=["dskernels", "dskernels.*"]), "dskernels.reference"}),
    package_dir={"dskernels": "dskernels", "dskernels.reference": "reference"},
)
