"""Package list; everything else is in pyproject.toml.

The folder `entrypoints/` is installed as `mac_decode_entrypoints`, because the name `entrypoints`
belongs to a package on PyPI. Only a package map renames a folder in wheels and editable installs
alike.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(
            include=["vllm_mac_decode", "vllm_mac_decode.*", "mlx_receiver", "mlx_receiver.*"]
        ),
        "mac_decode_entrypoints",
    ],
    package_dir={"mac_decode_entrypoints": "entrypoints"},
)
