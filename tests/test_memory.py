"""The option ``memory``, as people write it."""

import pytest

from fmpq_fx import memory
from fmpq_fx.memory import bytes_of, spelled


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7", 7),
        ("2GB", 2 * 10**9),
        ("2 gb", 2 * 10**9),
        ("2G", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("500MB", 5 * 10**8),
        ("10kib", 10240),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "GB", "2 XB", "-1GB", "1,5GB", "2iB", 0, -5, "0"])
def test_what_is_no_size(text: int | str) -> None:
    with pytest.raises(ValueError, match="memory is"):
        bytes_of(text)


@pytest.mark.parametrize("value", [True, 1.5, ["2GB"]])
def test_what_is_no_text(value: object) -> None:
    with pytest.raises(TypeError, match=f"memory is a {type(value).__name__}"):
        bytes_of(value)  # type: ignore[arg-type]


def test_a_quarter_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < bytes_of(None) < 2**50
    monkeypatch.setattr(memory, "_physical", lambda device: 10**9)
    assert bytes_of(None) == 10**9 // 4


def test_words_are_never_too_little() -> None:
    assert [spelled(size) for size in (10, 1000, 1_500_000, 1_510_000, 12 * 10**9 + 1)] == [
        *("1 kB", "1 kB", "1.5 MB", "1.6 MB", "12.1 GB")
    ]
    assert all(bytes_of(spelled(size)) >= size for size in (1, 999_999, 10**9 - 1, 123_456_789_123))
