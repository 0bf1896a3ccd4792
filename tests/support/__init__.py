"""What several test files share: models, graphs, tables and jobs for other processes."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
