"""Every reader on bytes that hypothesis changes; `tests/fuzz.py` does the same for longer."""

from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.hostile import corpus, fuzzing, strategies
from tests.hostile.readers import Reader

IDS = [f"{reader.name}: {Path(file).name}" for reader, file in fuzzing.PLACES]


@pytest.mark.parametrize(("reader", "file"), fuzzing.PLACES, ids=IDS)
@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=12,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_bytes_that_may_be_anything(
    reader: Reader, file: str, data: st.DataObject, tmp_path: Path
) -> None:
    if reader.slow:
        pytest.skip("its tables are those of other readers; see tests/fuzz.py")
    whole = (corpus.valid(reader.name)[0] / file).read_bytes()
    content = data.draw(strategies.contents(whole))
    outcome = fuzzing.attempt(reader, file, content, tmp_path)
    assert fuzzing.went_well(reader, file, outcome), outcome
