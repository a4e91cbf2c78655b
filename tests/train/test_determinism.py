import pytest
import torch

from ternarize.errors import ConfigError
from ternarize.train.determinism import deterministic_algorithms


@pytest.mark.parametrize("enabled", [False, True])
def test_the_setting_lasts_as_long_as_the_run(enabled: bool) -> None:
    with deterministic_algorithms(enabled):
        assert torch.are_deterministic_algorithms_enabled() is enabled
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match=r"^other$"), deterministic_algorithms(enabled):
        raise RuntimeError("other")
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    refusal = (
        "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'"
    )
    with (
        pytest.raises(ConfigError, match=r"^put_ does not have a deterministic implementation: train with --no-determ"),
        deterministic_algorithms(True),
    ):
        raise RuntimeError(refusal)
