"""What drawing scenes needs."""

from pathlib import Path

import pytest

from attnctl.glyph.scenes import font_path


@pytest.fixture(scope="session")
def font() -> Path:
    """The emoji font; a test that draws is skipped where it is missing."""
    try:
        return font_path()
    except FileNotFoundError as error:
        pytest.skip(str(error))
