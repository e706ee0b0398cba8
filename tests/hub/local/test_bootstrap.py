"""The file with the first keys."""

from pathlib import Path

import pytest

from hub.local.bootstrap import FirstKeys, write_first_keys


def test_the_file_is_private_and_keeps_the_keys_of_earlier_starts(tmp_path: Path) -> None:
    path = write_first_keys(FirstKeys("kh_admin", "kh_owner"), tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    assert write_first_keys(FirstKeys("kh_another", None), tmp_path) == path
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().splitlines() == ["HUB_ADMIN_KEY=kh_admin", "HUB_KEY=kh_owner", "HUB_ADMIN_KEY=kh_another"]


def test_keys_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "first-keys").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="first-keys"):
        write_first_keys(FirstKeys("kh_admin", None), tmp_path)
    assert not (tmp_path / "elsewhere").exists()
