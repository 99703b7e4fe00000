"""What the config's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.config_files import LEAST


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "x.yaml"
    file.write_text(LEAST)
    return str(file)
