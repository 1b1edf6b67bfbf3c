import pytest
import torch

from resnet_ensemble.training.model import PAPER_PARAMETERS, CifarResNet, ShortcutA, build, parameter_count

# Weights, biases, and batch norm's scale and shift; option A shortcuts add none.
EXACT = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962, 1202: 19_421_274}


@pytest.mark.parametrize("depth", EXACT)
def test_parameter_counts_are_those_of_table_6(depth: int) -> None:
    count = parameter_count(CifarResNet(depth))

    assert count == EXACT[depth]
    decimals = 2 if depth < 100 else 1
    assert round(count / 1e6, decimals) == PAPER_PARAMETERS[depth]


@pytest.mark.parametrize("depth", [20, 56])
def test_depth_counts_the_weighted_layers(depth: int) -> None:
    layers = [m for m in CifarResNet(depth).modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]

    assert len(layers) == depth


@pytest.mark.parametrize("depth", [2, 7, 21, 34])
def test_a_depth_that_is_not_6n_plus_2_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(depth)


def test_stages_halve_the_size_and_double_the_filters() -> None:
    model = build(8, 10).eval()
    x = torch.zeros(2, 16, 32, 32)

    second = model.layer2(model.layer1(x))

    assert second.shape == (2, 32, 16, 16)
    assert model.layer3(second).shape == (2, 64, 8, 8)


def test_option_a_subsamples_and_appends_zero_channels() -> None:
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).reshape(1, 2, 4, 4)

    y = ShortcutA(2, 5, stride=2)(x)

    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert not y[:, 2:].any()


def test_any_number_of_classes_and_any_size() -> None:
    model = build(8, 100).eval()

    assert model(torch.zeros(3, 3, 41, 27)).shape == (3, 100)


def test_state_dict_names_follow_torchvision() -> None:
    names = set(CifarResNet(20).state_dict())

    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "fc.bias"} <= names
