"""Each implementation of the update keeps the contract that all of them share."""

import pytest
from update_contract.contract import (
    LowersAsAnother,
    MakesChanges,
    UpdateContract,
    UpdatesAnyTree,
    UpdatesInPlace,
)
from update_contract.implementations import IMPLEMENTATIONS
from update_contract.sums import GivesSums


@pytest.mark.slow
class TestReference(UpdateContract, GivesSums, MakesChanges, UpdatesInPlace):
    implementation = IMPLEMENTATIONS["reference"]


class TestStableHLO(UpdateContract, GivesSums, MakesChanges, UpdatesInPlace):
    implementation = IMPLEMENTATIONS["stablehlo"]


class TestStableHLOForTPU(LowersAsAnother, MakesChanges):
    implementation = IMPLEMENTATIONS["tpu"]
    other = IMPLEMENTATIONS["stablehlo"]


@pytest.mark.slow
class TestStableHLOForCUDA(UpdateContract, GivesSums, MakesChanges):
    implementation = IMPLEMENTATIONS["cuda"]


class TestStableHLOForROCm(LowersAsAnother, MakesChanges):
    implementation = IMPLEMENTATIONS["rocm"]
    other = IMPLEMENTATIONS["cuda"]


class TestCPUKernel(UpdateContract, GivesSums, UpdatesInPlace, UpdatesAnyTree):
    implementation = IMPLEMENTATIONS["cpu kernel"]


class TestInterpretedGPUKernel(UpdateContract, GivesSums, UpdatesAnyTree):
    implementation = IMPLEMENTATIONS["gpu kernel"]


def test_every_implementation_is_tested() -> None:
    classes = [x for x in globals().values() if isinstance(x, type)]
    tested = [vars(x)["implementation"] for x in classes if "implementation" in vars(x)]
    assert tested == list(IMPLEMENTATIONS.values())
