"""What Alembic runs: `migrate` gives it a connection with a transaction and a lock."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
context.run_migrations()
