"""Makes every model that the tests use, for an environment that cannot: one without PyTorch.

python -m tests.make_models
"""

from tests.callers import calling_llama
from tests.conftest import cached_model
from tests.models import MODELS, fetch_smollm2

if __name__ == "__main__":
    print(fetch_smollm2())
    for name, write in {**MODELS, "calling-llama": calling_llama}.items():
        print(cached_model(name, write))
