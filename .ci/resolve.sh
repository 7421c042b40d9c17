#!/usr/bin/env bash
# Whether what users install can be resolved for their machines, which need not be this one.
# Nothing is installed but uv itself (`pip install uv`).
#
#   .ci/resolve.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv=${UV:-uv}
out=$(mktemp)
trap 'rm -f "$out"' EXIT

# MLX has no wheels for older ones.
export MACOSX_DEPLOYMENT_TARGET=14.0

resolve() { # EXTRA PLATFORM PYTHON
    printf '%-6s %-28s Python %-5s ' "$1" "$2" "$3"
    "$uv" pip compile --quiet --no-header --extra "$1" --python-platform "$2" \
        --python-version "$3" --no-build pyproject.toml --output-file "$out"
    grep -E '^(mlx|mlx-lm|vllm|torch)==' "$out" | paste -sd' '
}

for python in 3.11 3.12 3.13 3.14; do
    resolve mac aarch64-apple-darwin "$python"
done
for python in 3.11 3.12 3.13; do
    resolve spark aarch64-manylinux_2_34 "$python"
done
