#!/usr/bin/env bash
# The Mac's half by itself, without torch and vLLM: install it into ENV, test it, and let it check the
# machine. The same on a Mac and, with MLX's CPU build, on Linux.
#
#   .ci/receiver_only.sh ENV [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
env=${1:?usage: .ci/receiver_only.sh ENV [PYTEST ARGUMENTS]}
shift

# PyTorch writes the tests' models, in an environment that is thrown away.
models=$(mktemp -d)
trap 'rm -rf "$models"' EXIT
"${PYTHON:-python3}" -m venv "$models"
if [[ $(uname) == Linux ]]; then
    # PyPI's own build brings gigabytes of CUDA along.
    "$models/bin/python" -m pip install --quiet torch --index-url https://download.pytorch.org/whl/cpu
fi
"$models/bin/python" -m pip install --quiet --editable ".[demo,dev]" torch transformers
"$models/bin/python" -m tests.make_models

"${PYTHON:-python3}" -m venv "$env"
extras="mac,dev"
"$env/bin/python" -m pip install --quiet --editable ".[$extras]"
if [[ $(uname) == Linux ]]; then
    "$env/bin/python" -m pip install --quiet "mlx[cpu]>=0.32,<0.34"
fi
if "$env/bin/python" -c "import torch" 2>/dev/null || "$env/bin/python" -c "import vllm" 2>/dev/null; then
    echo "torch or vLLM is installed in $env: this would not test the Mac's half by itself" >&2
    exit 1
fi
"$env/bin/python" -m pytest tests/wire tests/pairing tests/discovery tests/mlx_receiver tests/fuzz "$@"
"$env/bin/mlx-receiver" check
