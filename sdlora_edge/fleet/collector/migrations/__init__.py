"""How the collector's database came to be, one file for each change (alembic)."""
