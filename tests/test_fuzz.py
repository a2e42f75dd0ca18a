"""The first models of the generator; ``make fuzz`` looks at thousands."""

import fuzz
import pytest

MODELS, FAST = 150, 60


@pytest.mark.parametrize("first", [
    pytest.param(first, marks=[pytest.mark.slow] * (first >= FAST)) for first in range(0, MODELS, 5)])
@pytest.mark.filterwarnings("ignore")
def test_random_models(first):
    for seed in range(first, first + 5):
        try:
            fuzz.check(seed)
        except Exception as error:
            error.add_note(f"the model of seed {seed}: {', '.join(fuzz.make(seed).model.names)}")
            raise


def test_the_generator_draws_everything_that_it_knows():
    names = {name for seed in range(MODELS) for name in fuzz.make(seed).model.names}
    assert names == fuzz.BLOCKS.keys()
