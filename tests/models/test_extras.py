"""The package's names, and what is said where an optional package is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import infuse.models
from infuse.models.extras import import_extra

WITHOUT = """
import sys
for package in {missing!r}:
    sys.modules[package] = None  # as if it were not installed
import infuse.models
assert infuse.models.Shard("m", 0, 0, 1).is_last_layer
assert infuse.models.load_model_config and infuse.models.Sampling(0.5)
{use}
"""


def test_every_name_is_there() -> None:
    pytest.importorskip("torchtune")
    pytest.importorskip("safetensors")
    for name in infuse.models.__all__:
        assert getattr(infuse.models, name).__name__ == name
    assert set(infuse.models.__all__) == set(infuse.models._MODULES)
    with pytest.raises(AttributeError, match="no attribute 'Shards'"):
        infuse.models.Shards  # noqa: B018


@pytest.mark.parametrize(
    ("missing", "use"),
    [
        ("torchtune", "infuse.models.GeneralMHA"),
        ("safetensors", "from infuse.models.checkpoint_files import CheckpointFiles; CheckpointFiles('.')"),
        ("tokenizers", "from infuse.models.tokenizer import TextStream; TextStream(None)"),
    ],
)
def test_a_missing_package_is_named_with_the_remedy(missing: str, use: str) -> None:
    code = WITHOUT.format(missing=[missing], use=use)
    result = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    message = f"infuse.models: {missing} is not installed, expected it for this; pip install 'infuse[models]'"
    assert result.returncode == 1
    assert message in result.stderr.splitlines()[-1], result.stderr


def test_a_module_that_an_installed_package_misses_is_its_own_error() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_part") as caught:
        import_extra("torch.no_such_part")
    assert "is not installed" not in str(caught.value)
